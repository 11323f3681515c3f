"""What comes with the package to begin with: its jobs, and new ones made of them."""
