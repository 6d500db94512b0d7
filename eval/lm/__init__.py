"""lm-eval's Hugging Face model with an ensemble: scoring, decoding, kept answers, work shared by processes."""

from eval.lm.model import EnsembleLM

__all__ = ["EnsembleLM"]
