"""Makes the golden caches of this format version in `data/golden/`: once for each released version, never again.

Run: python tests/make_golden.py            (a minute; refuses to change caches that are there)
"""

import json
import os
from pathlib import Path

import numpy as np
from kdcache.data import embedded_teacher

import kdcache
from kdcache.records.manifest import FORMAT_VERSION

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / FORMAT_VERSION
CODECS = {"topk": "topk,k=5", "adaptive": "adaptive,mean_k=3", "sampled": "sampled,draws=20", "dense": "dense,dtype=uint8"}
TEMPERATURES = (1.0, 2.0, 3.0)


def expected(cache: kdcache.Cache) -> dict[str, object]:
    """What a few records of a cache say, to be compared by the tests."""
    rows, views = np.arange(0, 2000, 199), np.arange(11) % cache.num_views
    soft = cache.soft_targets(rows, views)
    temperatures = TEMPERATURES if soft.sampled_at is None else (soft.sampled_at,)
    said = {f"{t:g}": [part.double().round(decimals=5).tolist() for part in soft.probs_at(t)] for t in temperatures}
    classes = None if soft.index is None else soft.index.tolist()
    return {"content": cache.manifest.content, "rows": rows.tolist(), "views": views.tolist(), "classes": classes, "probs": said}


def main() -> None:
    """Dumps the embedded teacher's answers to the test images with each codec, and converts the first cache."""
    os.environ |= {"SOURCE_DATE_EPOCH": "0", "LOGNAME": "kdcache"}
    os.chdir(embedded_teacher().parent)
    GOLDEN.mkdir(parents=True)
    teacher, said = Path(embedded_teacher().name), {}
    for name, codec in CODECS.items():
        path = GOLDEN / f"{name}-zarr"
        command = f"kdcache dump --teacher {teacher} --data fashion-mini,split=test --views 2 --codec {codec}"
        kdcache.dump(teacher, "fashion-mini,split=test", path, views=2, codec=codec, block_samples=1200, device="cpu", command=command)
        said[name] = expected(kdcache.Cache(path))
        for layout in ("parquet", "compact") if name in ("topk", "adaptive") else ():
            kdcache.convert(path, GOLDEN / f"{name}-{layout}", layout=layout)
    (GOLDEN / "expected.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
