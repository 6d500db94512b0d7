"""What watches over a run: signals, launchers, other ranks, hangs, bad steps."""
