"""What a row may not answer, whatever the model says."""
