"""Certified discrepancy."""
