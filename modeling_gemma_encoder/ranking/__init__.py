"""Ranking: data to train on, judged collections, scores of a trained ranker, and their evaluation."""
