"""Every random choice of a run is a hash of the run's seed and of what is being chosen, so any tool can draw it
again."""

import hashlib
import json


def derive_seed(run_seed: int, *what: str | int) -> int:
    """A 63-bit seed for one choice, e.g. derive_seed(1, "sampling", iteration, prompt_id, sample_index).

    The parts are hashed as JSON, so ("a", "bc") and ("ab", "c") differ, and so do 1 and "1".
    """
    digest = hashlib.blake2b(json.dumps([run_seed, *what]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
