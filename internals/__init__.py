"""The machinery that nobody edits for an experiment."""
