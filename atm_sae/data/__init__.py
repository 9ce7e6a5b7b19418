"""Text, language models, planted worlds, and batches of their activations."""
