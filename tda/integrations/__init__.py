"""Where results go, and where training comes from: one file a partner, each an extra of its own.

lightning.py transformers.py    record a training as it runs, for `tda.recorded`
sheet.py                        values, intervals and flags of training examples, by id …
frames.py                       … as pandas frames, with top k and scores
hf_datasets.py                  … as columns of a Hugging Face data set
cleanlab.py                     … as issues of a Datalab
fiftyone.py                     … as fields of FiftyOne samples
mlflow.py                       a report's numbers and files in an MLflow run

Importing one of them imports its partner; without it, the ConfigError names the pip command.
"""
