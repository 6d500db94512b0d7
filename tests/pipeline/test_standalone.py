"""The folder pipeline/lora_dropout stands alone: outside the repository, without the rest, without bitsandbytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = """
assert len(dropout.layers) == 14
assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)
assert logits.shape == (4, 16, 256)
with torch.no_grad():
    stock = model(ids).logits
    assert not torch.equal(logits, stock)  # B has left 0
    with dropout.masks("train", [(1,)]):
        assert not torch.equal(model(ids).logits, stock)
    assert torch.equal(model(ids).logits, stock)
    members = []
    for number in range(8):  # one after another, as in one batch
        with dropout.members([number]):
            members.append(model(ids).logits)
torch.testing.assert_close(torch.stack(members).mean(dim=0), logits, atol=1e-5, rtol=0)
assert not any(layer.layer.lora_variant for layer in dropout.layers.values())
"""
# what the same step by peft alone has loaded, before our first line
STOCK_STEP = """
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.zero_grad()
import sys
before = set(sys.modules)
"""
REPORT = """
import json
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# stands for an environment where bitsandbytes is not installed: nothing finds it, nobody can import it
WITHOUT_BITSANDBYTES = """
import sys
from importlib.machinery import PathFinder

class WithoutBitsandbytes(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "bitsandbytes" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutBitsandbytes
"""


@pytest.fixture(scope="module")
def readme_blocks(repository: Path) -> list[str]:
    """Python of the README's section: set-up, the five lines, the ensemble."""
    section = (repository / "README.md").read_text().partition("## Use it without the rest\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


def run_outside(code: str, folder: Path) -> str:
    """What the code prints, run as a file in a folder that has nothing to do with the repository."""
    (folder / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_readmes_five_lines_run_anywhere_and_load_nothing_else(readme_blocks: list[str], tmp_path: Path) -> None:
    """What they load after a stock step is this folder, and peft's layers that it masks."""
    set_up, five, ensemble = readme_blocks
    assert len(five.splitlines()) == 5
    said = run_outside(set_up + STOCK_STEP + five + ensemble + CHECKS + REPORT, tmp_path)
    loaded = json.loads(said.splitlines()[-1])
    assert "pipeline.lora_dropout" in loaded
    assert [name for name in loaded if not name.startswith(("pipeline.lora_dropout", "peft.tuners."))] == ["pipeline"]


def test_works_where_bitsandbytes_is_not_installed(readme_blocks: list[str], tmp_path: Path) -> None:
    run_outside(
        WITHOUT_BITSANDBYTES + "".join(readme_blocks) + CHECKS + "assert 'bitsandbytes' not in sys.modules", tmp_path
    )


def test_no_module_of_the_folder_names_the_rest(repository: Path) -> None:
    """Not even in a function: trl, DeepSpeed and the other rooms are never imported."""
    for file in (repository / "pipeline" / "lora_dropout").glob("*.py"):
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), flags=re.MULTILINE)
        packages = {module.partition(".")[0] for module in modules if not module.startswith("pipeline.lora_dropout")}
        assert packages <= {*sys.stdlib_module_names, "torch", "peft"}, (file.name, packages)
