"""What keeps a machine from working: facts, checks of them, and what to do."""
