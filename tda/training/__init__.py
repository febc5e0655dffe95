"""What is known of the training that made a checkpoint.

optimizer.py  the optimiser's saved state: momentum, moments, weight decay
schedule.py   how far training went, and the damping that implies
metric.py     gradients scaled as the optimiser scales them
recorder.py   keeps all of this while a model trains
smoothing.py  one trained model as several, with noise on its weights (noise.py)
"""
