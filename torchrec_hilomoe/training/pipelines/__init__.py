"""A step: TorchRec's pipelines, driven as plain iterators."""
