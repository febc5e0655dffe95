"""Attribution without a store: nothing is projected, the training set is streamed once.

streaming.py           `tda.attribute`: queries in parameter space, inner products with gradients
requirements.py        recipes that have no meaning there
preconditioners.py     F there: by EK-FAC, or solved
conjugate_gradient.py  the solver
"""
