"""Metrics, progress, trackers and the report page."""
