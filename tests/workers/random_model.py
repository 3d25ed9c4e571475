"""Small random Qwen2.5-VL checkpoints made by transformers, and a batch with all that is awkward in it. The reference
of the model tests."""

from pathlib import Path

import torch

IMAGE, VIDEO, START, END, PAD = 250, 251, 252, 253, 2
GRIDS = [(1, 12, 20), (1, 8, 6), (1, 8, 6), (1, 4, 4), (1, 18, 2)]
"""Windows are 8 x 8 patches: these give full, ragged and one-cell-wide ones. The first two belong to row 0, the rest to
row 1."""


def hf_config(tied: bool):
    """All sizes different, two key-value groups, divisible by 4 (tensor-parallel) and 2 (pipeline)."""
    from transformers import Qwen2_5_VLConfig

    text = dict(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=PAD,
        tie_word_embeddings=tied,
    )
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=44,
        num_heads=4,
        out_hidden_size=64,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[1],
        in_channels=3,
        initializer_range=0.1,
    )
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)


def make(tied: bool, seed: int = 0):
    """A float32 model whose biases and norms are off their defaults, so that a forgotten one shows."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(hf_config(tied), attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def batch() -> dict:
    """Three right-padded rows: two pictures, three pictures, text only."""
    random = torch.Generator().manual_seed(3)

    def text(count):
        return torch.randint(3, 240, (count,), generator=random).tolist()

    def picture(grid):
        return [START] + [IMAGE] * (grid[1] * grid[2] // 4) + [END]

    rows = [
        text(4) + picture(GRIDS[0]) + text(3) + picture(GRIDS[1]) + text(6),
        picture(GRIDS[2]) + picture(GRIDS[3]) + text(5) + picture(GRIDS[4]) + text(2),
        text(17),
    ]
    length = -(-max(map(len, rows)) // 4) * 4
    input_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    patches = sum(rows * columns for _, rows, columns in GRIDS)
    labels = torch.roll(input_ids, -1, 1)
    weights = (attention_mask * torch.roll(attention_mask, -1, 1)).float()
    weights[:, -1] = 0
    return dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=torch.randn(patches, 1176, generator=random),
        labels=labels,
        weights=weights / weights.sum(),
        grids=GRIDS,
    )


def some_rows(data: dict, rows: list[int]) -> dict:
    """Part of the batch, with the pictures of those rows: [0, 2] has two of them, [2] none."""
    patches = [rows * columns for _, rows, columns in GRIDS]
    pictures = [picture for row in rows for picture in ([0, 1], [2, 3, 4], [])[row]]
    pixels = data["pixel_values"].split(patches)
    chosen = {name: data[name][rows] for name in ("input_ids", "attention_mask", "labels", "weights")}
    chosen["pixel_values"] = torch.cat([pixels[picture] for picture in pictures]) if pictures else None
    return chosen | {"grids": [GRIDS[picture] for picture in pictures]}


def reference(model, data: dict) -> dict:
    """transformers' logits, loss and the gradient of every parameter, by official on-disk name; zeros for a tower
    without a picture."""
    from megatron_papo.checkpoint.name_map import disk_name

    model.zero_grad()
    image_types = (data["input_ids"] == IMAGE).int()
    grids = torch.tensor(data["grids"]) if data["grids"] else None
    positions, _ = model.model.get_rope_index(
        data["input_ids"], image_types, grids, attention_mask=data["attention_mask"]
    )
    logits = model(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"],
        pixel_values=data["pixel_values"],
        image_grid_thw=grids,
        mm_token_type_ids=image_types,
    ).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), reduction="none")
    loss = (losses * data["weights"].flatten()).sum()
    loss.backward()
    gradients = {
        disk_name(name): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return dict(position_ids=positions, logits=logits.detach(), loss=float(loss.detach()), gradients=gradients)
