"""How the embedded demo model is made; `scripts/train_demo.py` is the command."""
