"""The command finetune: a generator is trained on with images weighted by their density."""
