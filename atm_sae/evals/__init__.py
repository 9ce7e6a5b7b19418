"""What is measured on an SAE."""
