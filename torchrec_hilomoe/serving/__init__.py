"""From a checkpoint to probabilities for raw rows.

export.py   checkpoint -> artifact        artifact.py   the folder, whole and checked
model.py    plain tensors in, logits out  inputs.py     rows -> those tensors
tables.py   embeddings in 32, 16, 8 bits  program.py    torch.export, every size free
archive.py  nothing but a program?        package.py    the program as machine code
scorer.py   raw rows -> probabilities     requests.py   raw values -> ids
teacher.py  logits for another's training
"""

from torchrec_hilomoe.serving.export import export_model, ExportOptions
from torchrec_hilomoe.serving.scorer import Scorer

__all__ = ["ExportOptions", "Scorer", "export_model"]
