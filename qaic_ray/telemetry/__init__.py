"""What is measured while a run goes, under names that dashboards know."""
