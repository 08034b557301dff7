"""Evaluation: what a video shows, read without learned weights, and the reports made from it."""
