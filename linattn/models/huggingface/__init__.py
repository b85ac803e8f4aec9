"""What the Hugging Face models share: caches of states, padding, checkpoints loaded whole or not at all."""
