"""How good a model's images are: distances between two sets of images, likelihood, and what was learnt by heart."""
