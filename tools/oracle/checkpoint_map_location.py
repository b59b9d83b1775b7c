"""Print, as JSON, for which map_location values of the JSON list in argument 2 torch.load reads the file of argument 1."""

import json
import sys

import torch

outcomes = []
for value in json.loads(sys.argv[2]):
    try:
        torch.load(sys.argv[1], map_location=value)
        outcomes.append("ok")
    except Exception:  # torch raises RuntimeError, AssertionError and others for a device that is not there
        outcomes.append("error")
print(json.dumps(outcomes))
