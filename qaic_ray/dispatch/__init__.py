"""Which worker answers which prompts next: pure state machines."""
