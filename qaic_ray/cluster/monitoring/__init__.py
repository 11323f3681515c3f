"""Metrics through Ray, and the dashboards that show them."""
