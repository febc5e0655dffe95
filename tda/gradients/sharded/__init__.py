"""A model that torch's FSDP2 has spread over processes: one leads, the others follow its passes.

Every process calls `tda.lead`. Rank 0 runs the work, and alone reads data, decides and writes; each
pass of the model that it comes to is told to the others, who take part with their share of the
weights and drop what comes out. So nothing but passes has to be the same everywhere. The rows of a
table, which most passes are for, are divided: each process computes those of some of the examples.

The model is used as it lies. FSDP2 gathers a module's parameters for each use into tensors that are
always the same objects (their storage is freed in between), by which a tap knows them.

    leading.py   `lead`: what a model must be, and who leads
    session.py   the leader tells, the others follow
    passes.py    passes of such a model, told and shared
    weights.py   its parameters: whole, in shares, from a checkpoint
"""
