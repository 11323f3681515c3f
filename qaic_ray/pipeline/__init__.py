"""The recipe's three steps as one caller wants them, and a job that joins them. Prints nothing."""
