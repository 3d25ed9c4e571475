"""Finished samples survive the stage that asked for them; only what is missing is asked for again."""

import dataclasses
import errno
import os

import pytest

from megatron_papo.errors import UserError
from megatron_papo.sglang.client import SglangClient
from megatron_papo.sglang.sample_store import SampleStore, remove_store
from tests.sglang.false_server import false_server
from tests.sglang.test_answers import SAMPLING, requests


class Killed(BaseException):
    pass


def sample(server, path, wanted, sampling=SAMPLING, version="v", dtype="float32", kill_after=None):
    """Sample through a store, from a client of its own. kill_after: the stage dies at this sample."""
    finished = []

    def on_sample(index, one):
        finished.append(index)
        if len(finished) == kill_after:
            raise Killed

    client = SglangClient([server], 3, 5.0)
    with SampleStore(path, dtype) as store:
        return client.sample(wanted, sampling, version, on_sample, store=store), client.traffic.stored


def seeds(behind):
    """What was asked for since the last call."""
    asked = sorted(body["sampling_params"]["sampling_seed"] for body in behind.bodies)
    behind.bodies.clear()
    return asked


def test_a_killed_stage_goes_on_where_it_was(tmp_path):
    path = tmp_path / "store"
    with false_server() as (server, behind):
        undisturbed, _ = sample(server, tmp_path / "other", requests())
        seeds(behind)
        with pytest.raises(Killed):
            sample(server, path, requests(), kill_after=5)
        kept = path.read_bytes().splitlines()
        assert len(kept) >= 5
        path.write_bytes(b"\n".join(kept) + b"\n" + kept[0][:-20])  # the line that it was about to write
        seeds(behind)
        again, stored = sample(server, path, requests())
        asked = set(seeds(behind))  # what the killed one had sent may still have come in
        assert again == undisturbed and stored == len(kept) and len(asked) == 12 - len(kept)
        assert sample(server, path, requests()) == (undisturbed, 12) and seeds(behind) == []
        assert len(path.read_bytes().splitlines()) == 12


def test_more_samples_ask_for_the_others_only(tmp_path):
    with false_server() as (server, behind):
        four, _ = sample(server, tmp_path / "s", requests(4))
        seeds(behind)
        six, stored = sample(server, tmp_path / "s", requests(6))
        assert six[:4] == four and stored == 4 and seeds(behind) == [4, 5]


def test_enough_is_enough_of_what_is_kept_too(tmp_path):
    """As with rollout.over_sampling: what is kept counts first, and every request is accounted for."""
    with false_server() as (server, behind):
        undisturbed, _ = sample(server, tmp_path / "s", requests())
        seeds(behind)
        seen, client = [], SglangClient([server], 3, 5.0)
        with SampleStore(tmp_path / "s", "float32") as store:
            found = client.sample(
                requests(20), SAMPLING, "v", lambda *one: seen.append(one), lambda: len(seen) >= 5, store
            )
        finished, traffic = [one for one in found if one is not None], client.traffic
        assert finished == undisturbed[: len(finished)] and len(finished) == len(seen) == traffic.stored >= 5
        assert traffic.stored + traffic.cancelled_running + traffic.cancelled_waiting == 20 and seeds(behind) == []


def test_another_request_is_another_sample(tmp_path):
    """Each of these would be sampled otherwise, and is asked for again; the first is there still."""
    path = tmp_path / "s"
    hotter, longer = (dataclasses.replace(SAMPLING, **{name: 2}) for name in ("temperature", "max_response_tokens"))
    [one] = requests(1)
    prompt = one.prompt.model_copy(update={"token_ids": [5, 6, 8]})
    with false_server() as (server, behind):
        first, _ = sample(server, path, [one])
        seeds(behind)
        others = [
            ([one], {"sampling": hotter}),
            ([one], {"sampling": longer}),
            ([one], {"dtype": "bfloat16"}),
            (requests(1, picture="another"), {}),
            ([dataclasses.replace(one, prompt=prompt)], {}),
            ([dataclasses.replace(one, prompt=one.prompt.model_copy(update={"id": "q"}))], {}),
        ]
        for wanted, how in others:
            assert sample(server, path, wanted, **how)[1] == 0 and seeds(behind) == [0]
        behind.version = "w"
        assert sample(server, path, [one], version="w")[1] == 0 and seeds(behind) == [0]
        assert sample(server, path, [one]) == (first, 1) and seeds(behind) == []


@pytest.mark.parametrize("damage", [b"\xff\x00garbage", b"[]", b'{"key": 1}', b"{}"])
def test_damaged_lines_are_asked_for_again(tmp_path, damage):
    path = tmp_path / "s"
    with false_server() as (server, behind):
        undisturbed, _ = sample(server, path, requests(3))
        lines = path.read_bytes().splitlines()
        lines[1] = damage
        path.write_bytes(b"\n".join(lines) + b"\n")
        seeds(behind)
        assert sample(server, path, requests(3)) == (undisturbed, 2) and len(seeds(behind)) == 1


def test_what_the_file_says_is_believed_no_more_than_a_server(tmp_path):
    path = tmp_path / "s"
    with false_server() as (server, behind):
        undisturbed, _ = sample(server, path, requests(1))
        seeds(behind)
        path.write_bytes(path.read_bytes().replace(b'"log_probs":[-', b'"log_probs":['))
        assert sample(server, path, requests(1)) == (undisturbed, 0) and seeds(behind) == [0]


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path, monkeypatch):
    path = tmp_path / "s"
    with false_server() as (server, _):
        sample(server, path, requests(2))
        with SampleStore(path, "float32") as store:

            class Full:
                def write(self, content):
                    raise OSError(errno.ENOSPC, "No space left on device")

                def close(self):
                    pass

            store._stream.close()
            store._stream = Full()
            with pytest.raises(UserError, match=rf"{path}: cannot be written \(No space left.*the 2 samples"):
                SglangClient([server], 1, 5.0).sample(requests(3), SAMPLING, "v", store=store)
        assert len(path.read_bytes().splitlines()) == 2


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/s: .*directory"):
        SampleStore(tmp_path / "s", "float32")


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"text": "a row of mine"}\n', b"\n\n", b'{"key":"mine"', b"\x00"]
)
def test_somebodys_own_file_is_neither_cut_nor_removed(tmp_path, content):
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: is in the way"):
        SampleStore(path, "float32")
    remove_store(path)
    assert path.read_bytes() == content


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "s")
    with pytest.raises(UserError, match="no file"):
        SampleStore(tmp_path / "s", "float32")


def test_what_is_ours_is_taken_and_removed(tmp_path):
    path = tmp_path / "s"
    with false_server() as (server, _):
        sample(server, path, requests(1))
    line = path.read_bytes()
    for content in (b"", line, line[:-9], b"damaged\n" + line):
        path.write_bytes(content)
        with SampleStore(path, "float32"):
            pass
        remove_store(path)
        assert not path.exists()
