"""Files of predictions become sets: several passes over the same prompts are joined, anything else is refused.

What tells the prompts of a set apart is in `Response.prompt`; several rows with the same are told apart by their order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from megatron_papo.config import BenchmarkConfig
from megatron_papo.errors import UserError
from megatron_papo.evaluation.outputs import AS_SAMPLED, PREDICTIONS, evaluated_directories
from megatron_papo.evaluation.outside_predictions import PredictionsFile, responses, scan
from megatron_papo.reading import reading, shown
from megatron_papo.run.records import ImageShown, Protocol

MOSTLY = 0.5
"""Files that share more of their prompts than this, and not all, are passes of which one is incomplete or another."""


@dataclass(frozen=True)
class Passes:
    """Where the responses of a file belong."""

    prompts: list[bytes]
    """Keys of the prompts of one pass, in order."""
    place: list[int]
    """Of each response: the position of its prompt there."""
    sample: list[int]
    """Of each response: how many of its prompt come before it."""
    count: int
    is_guess: bool = False
    """Taken from lines that repeat without ids: they may be prompts of one pass with different pictures."""


@dataclass
class JoinedSet:
    """Responses to the prompts of one set, of one file or several."""

    name: str
    is_named: bool
    """By the user or the suite, not after a file."""
    files: list[PredictionsFile] = field(default_factory=list)
    passes: list[Passes] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        return self.files[0].ours

    @property
    def prompts(self) -> list[bytes]:
        return self.passes[0].prompts

    def places(self) -> Iterator[tuple[PredictionsFile, list[tuple[int, int]]]]:
        """Yield each file with the position of the prompt, from 0, and the number of the sample of its responses."""
        positions = {key: position for position, key in enumerate(_numbered(self.prompts))}
        samples_before = 0
        for file, passes in zip(self.files, self.passes, strict=True):
            own = [positions[key] for key in _numbered(passes.prompts)]
            pairs = zip(passes.place, passes.sample, strict=True)
            yield file, [(own[place], samples_before + sample) for place, sample in pairs]
            samples_before += passes.count


def joined_sets(
    arguments: Sequence[str],
    suite: Mapping[str, BenchmarkConfig],
    image: ImageShown,
    passes_per_file: int | None = None,
) -> list[JoinedSet]:
    """Return the sets that a user names. Raises UserError before anything is graded.

    Args:
        arguments: as a user types them: FILE, DIRECTORY, RUN, RUN@ITERATION or NAME=FILE,FILE,...
        suite: sets by name; a file called like a set, its split or its archive is a file of that set.
        image: which of our predictions count.
        passes_per_file: how many passes a file of others holds; None: as often as it repeats itself.
    """
    sets: list[JoinedSet] = []
    seen: dict[str, Path] = {}
    explicit: set[str] = set()
    for argument in arguments:
        name, paths = _split(argument)
        if name is not None and name in explicit:
            raise UserError(f"{shown(name)}: named twice: give its files in one argument, {shown(name)}=FILE,FILE")
        explicit |= {name} if name is not None else set()
        for path in chain.from_iterable(map(_files, paths)):
            chosen = name or _set_named_after(path, suite)
            file = scan(path, image, _column(suite.get(chosen or "")))
            if file.digest in seen:
                raise UserError(f"{shown(path)}: holds the same as {shown(seen[file.digest])}: give it once")
            seen[file.digest] = path
            _add(sets, file, passes_of(file, passes_per_file), chosen)
    _require_one_evaluation(sets)
    return sets


def _split(argument: str) -> tuple[str | None, list[str]]:
    """Return the name of a set, where the argument gives one, and paths."""
    name, sign, rest = argument.partition("=")
    with reading(argument, "name a file of predictions"):
        if not sign or Path(argument).exists():
            return None, [argument]
    if not name.strip() or not all(rest.split(",")):
        raise UserError(f"{shown(argument)}: expected NAME=FILE or NAME=FILE,FILE,...")
    return name, rest.split(",")


def _files(text: str) -> list[Path]:
    """Return the files of predictions that a path stands for: itself, those of an evaluation, or of a directory."""
    path = Path(text)
    with reading(path, "name a file of predictions"):
        if not path.is_dir() and (path.exists() or "@" not in text):
            return [path]
        ours = (path / "evaluation").is_dir() or any(path.glob(PREDICTIONS)) or any(path.glob(f"*/{PREDICTIONS}"))
        theirs = [] if ours else sorted(path.glob("*.jsonl"))
    return theirs or [directory / PREDICTIONS for directory in evaluated_directories(text)[2]]


def _set_named_after(path: Path, suite: Mapping[str, BenchmarkConfig]) -> str | None:
    """Return the set of the suite that a file is called after; None where there is none."""
    stem = _letters(path.stem)
    for name, entry in suite.items():
        archive = (entry.image_archive or "").removesuffix(".zip").removesuffix("_images")
        if stem in {_letters(name), _letters(entry.split or ""), _letters(archive)}:
            return name
    return None


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _column(entry: BenchmarkConfig | None) -> str | None:
    rule = entry.problem_by if entry else "row"
    return rule.removeprefix("column:") if rule.startswith("column:") else None


def passes_of(file: PredictionsFile, count: int | None) -> Passes:
    """Return where the responses of a file belong. Raises UserError where its passes are over different prompts.

    Args:
        file: as scanned.
        count: of the passes that a file of others holds; None: as often as it repeats itself.
    """
    keys, where = file.keys, shown(file.path)
    if file.ours and count is not None:
        raise UserError(f"--passes {count}: {where} says itself which sample each response is: leave --passes out")
    if not file.ours:
        period = _period(keys)
        rest = len(keys) % period
        if count is None and rest and _is_repetition(keys[:period], keys[-rest:], file.has_ids):
            raise UserError(
                f"{where}: its {len(keys)} responses are {len(keys) // period} whole passes over {period} prompts and"
                f" {rest} responses more: make the others, or say how many passes it holds, --passes 1"
            )
        likely = len(keys) // period if not rest else 1
        if count is None and likely == 1 and _are_samples(keys, file.has_ids):
            likely = 0
        wanted = likely if count is None else count
        if wanted and len(keys) % wanted == 0 and (wanted == 1 or len(keys) // wanted % period == 0):
            length = len(keys) // wanted
            rows = range(len(keys))
            is_guess = count is None and wanted > 1 and not file.has_ids
            return Passes(
                keys[:length], [row % length for row in rows], [row // length for row in rows], wanted, is_guess
            )
    places: dict[bytes, int] = {}
    place = [places.setdefault(key, len(places)) for key in keys]
    is_guess = count is None and not file.ours and not file.has_ids
    samples: Counter[int] = Counter()
    sample = []
    for prompt in place:
        sample.append(samples[prompt])
        samples[prompt] += 1
    if count is None:
        count = max(samples.values())
    for prompt, number in samples.items():
        if number != count:
            raise UserError(
                f"{where}:{_line_of(file, list(places)[prompt])}: {number} responses to its prompt, where others have"
                f" {count}: make the rest, or leave the file out"
            )
    return Passes(list(places), place, sample, count, is_guess and count > 1)


def _is_repetition(first: Sequence[bytes], rest: Sequence[bytes], has_ids: bool) -> bool:
    """Return whether the rows after the last whole pass began another one: not where prompts that a single pass has
    more than once, as in a set that asks one question of every picture, are all they hold."""
    times = Counter(first)
    return has_ids or any(times[key] == 1 for key in rest)


def _are_samples(keys: Sequence[bytes], has_ids: bool) -> bool:
    """Return whether rows with the same prompt are several responses to it, prompt by prompt, and not several prompts:
    where the rows have ids, or where all prompts come equally often."""
    times = set(Counter(keys).values())
    return times != {1} and (has_ids or len(times) == 1)


def _period(keys: Sequence[bytes]) -> int:
    """Return the length of the shortest beginning whose repetition makes the whole sequence, the last time perhaps cut
    short. Linear time: the failure function of Knuth, Morris and Pratt."""
    longest = [0] * len(keys)
    for position in range(1, len(keys)):
        length = longest[position - 1]
        while length and keys[position] != keys[length]:
            length = longest[length - 1]
        longest[position] = length + (keys[position] == keys[length])
    return len(keys) - longest[-1]


def _add(sets: list[JoinedSet], file: PredictionsFile, passes: Passes, name: str | None) -> None:
    """Add a file to the set that it belongs to, or begin a new one. name: of its set; None: after the file."""
    own_name = name or (file.protocol.set if file.protocol else None)
    called = own_name or (file.path.parent.name if file.path.name == PREDICTIONS else file.path.stem)
    counts = Counter(passes.prompts)
    for other in sets:
        common = (counts & Counter(other.prompts)).total()
        same = common == len(passes.prompts) == len(other.prompts)
        if own_name is not None and other.is_named:
            if other.name != called:
                continue
            _require_same_kind(other, file)
        elif other.name == called and not common:
            raise UserError(
                f"{shown(file.path)} and {shown(other.files[0].path)}: two sets that would both be called"
                f" {shown(called)}: name them, NAME=FILE"
            )
        elif other.name != called and not same and common <= MOSTLY * min(len(passes.prompts), len(other.prompts)):
            continue
        if not same:
            raise _different_prompts(other, file, passes)
        _require_same_kind(other, file)
        other.files.append(file)
        other.passes.append(passes)
        return
    sets.append(JoinedSet(called, own_name is not None, [file], [passes]))


def _different_prompts(other: JoinedSet, file: PredictionsFile, passes: Passes) -> UserError:
    """Return what to say of a file most of whose prompts are those of a set."""
    first = other.files[0]
    for one, prompts, against, against_prompts in (
        (file, passes.prompts, first, other.prompts),
        (first, other.prompts, file, passes.prompts),
    ):
        for key in (Counter(prompts) - Counter(against_prompts)).keys():
            line = _line_of(one, key)
            return UserError(
                f"{shown(one.path)}:{line}: not a prompt of {shown(against.path)} (by {_what(one)}): passes over"
                " different prompts: make the rest, or name two sets, NAME=FILE NAME=FILE"
            )
    raise AssertionError("the same prompts")


def _what(file: PredictionsFile) -> str:
    return "prompt_id and answer" if file.ours else "id, prompt and label"


def _line_of(file: PredictionsFile, key: bytes) -> int:
    """Return the number of the first line with this prompt."""
    position = file.keys.index(key)
    response = next(islice(responses(file.path, file.image), position, None))
    return int(response.place.rpartition(":")[2])


def _numbered(keys: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield each key with how often it has come before."""
    times: Counter[bytes] = Counter()
    for key in keys:
        yield key, times[key]
        times[key] += 1


def _require_same_kind(other: JoinedSet, file: PredictionsFile) -> None:
    """Raise UserError where two files of one set are not of one program, checkpoint and protocol, or share samples."""
    for one in other.files:
        pair = f"{shown(file.path)} and {shown(one.path)}"
        if one.ours != file.ours:
            raise UserError(f"{pair}: one is of PAPO-Eval, the other is not: score them one by one")
        if one.protocol and file.protocol and (found := _differences(file.protocol, one.protocol)):
            raise UserError(f"{pair} differ in {'; '.join(found)}: no passes of one evaluation: score them one by one")
        if one.seeds & file.seeds:
            raise UserError(f"{pair}: hold the same samples (prompt and sampling seed): leave one out")


def _differences(one: Protocol, other: Protocol) -> list[str]:
    """Return in what two evaluations of a set differ so that their samples are not those of one."""
    found = [] if one.data == other.data else ["prompts"]
    return found + _different_settings(one, other, one.protocol.keys() | other.protocol.keys())


def _different_settings(one: Protocol, other: Protocol, keys: Iterable[str]) -> list[str]:
    """Return the checkpoint, where it differs, and those of the keys that do."""
    found = [] if one.checkpoint == other.checkpoint else [f"checkpoint ({shown(one.hf)} and {shown(other.hf)})"]
    pairs = {key: (one.protocol.get(key, "not given"), other.protocol.get(key, "not given")) for key in sorted(keys)}
    return found + [shown(f"{key} ({first} and {second})") for key, (first, second) in pairs.items() if first != second]


def _require_one_evaluation(sets: Iterable[JoinedSet]) -> None:
    """Raise UserError where sets were answered by different checkpoints, or sampled differently, as far as the files
    say so: there is no average over them."""
    known = [(file, file.protocol) for one in sets for file in one.files if file.protocol]
    for file, protocol in known[1:]:
        first, its_protocol = known[0]
        if found := _different_settings(its_protocol, protocol, AS_SAMPLED):
            raise UserError(
                f"{shown(first.path)} and {shown(file.path)} differ in {'; '.join(found)}: score them one by one"
            )
