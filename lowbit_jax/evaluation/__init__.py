"""Judging quantised models: exact tests, metrics, prompt suites, reports."""
