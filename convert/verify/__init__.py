"""Proving that a checkpoint directory is what it should be: its structure, every byte, and values made again."""
