"""Tables, figures, pages, and the runner that makes them."""
