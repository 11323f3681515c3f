"""One card: a QPC loaded through qaicrt, and the token loop over it."""
