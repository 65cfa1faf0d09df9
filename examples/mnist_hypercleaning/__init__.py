"""Data hypercleaning: a learned weight for every training example finds the wrong labels."""
