"""The process of one figure: `python -m linattn.bench.worker` with one JSON argument; the answer is JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from linattn.bench.cases import Figure
from linattn.bench.measure import measure

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Figure(**asked["figure"]), asked["runs"]))))
