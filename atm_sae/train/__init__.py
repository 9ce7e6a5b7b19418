"""The training loop, and runs named by what determines them."""
