"""Small backbones with random weights, in the layouts of KerasHub and Hugging Face."""

import json
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from mm_model.backbones import HUB_IMAGES, HUB_TEXTS
from mm_model.backbones.hub import hub_tokenizer, make_hub_image, make_hub_text

SIZE = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "crack", "##s"]


def randomized(backbone: Any) -> Any:
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        if keras.backend.is_float_dtype(weight.dtype):
            weight.assign(rng.normal(size=weight.shape) * 0.3)
    return backbone


def vit(size: int = 32) -> Any:
    options = {**SIZE, "mlp_dim": 16, "patch_size": 8, "image_shape": (size, size, 3)}
    return randomized(keras_hub.models.ViTBackbone(**options, layer_norm_epsilon=1e-6))


def bert() -> Any:
    options = {**SIZE, "intermediate_dim": 16, "vocabulary_size": len(WORDS)}
    return randomized(keras_hub.models.BertBackbone(**options, max_sequence_length=12, dropout=0.0))


def pixels(size: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.float32)


def test_an_image_folder_of_keras_hub_gives_the_outputs_of_its_backbone(tmp_path):
    backbone = vit()
    backbone.save_to_preset(str(tmp_path))
    outputs = make_hub_image("vit_tiny", (32, 32, 3), str(tmp_path))(pixels())
    expected = np.asarray(backbone(pixels() / 127.5 - 1))
    np.testing.assert_allclose(outputs["pooled"], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(outputs["tokens"], expected[:, 1:], atol=1e-5)


FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "deit_tiny": ("DeiTBackbone", {**SIZE, "intermediate_dim": 16, "patch_size": 8}, 2),
    "dinov2_small": (
        "DINOV2Backbone",
        {**SIZE, "intermediate_dim": 16, "patch_size": 8, "position_embedding_shape": (32, 32)},
        1,
    ),
    "dinov3_small": ("DINOV3Backbone", {**SIZE, "intermediate_dim": 16, "patch_size": 8}, 5),
}
"""Class, size and number of tokens before the patches."""


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_other_families_give_the_outputs_of_their_backbones(family, tmp_path):
    name, options, num_prefix = FAMILIES[family]
    backbone = getattr(keras_hub.models, name)(image_shape=(32, 32, 3), **options)
    randomized(backbone)
    for layer in backbone.layers:
        if hasattr(layer, "interpolated_position_embeddings"):
            layer.position_embeddings.assign(layer.interpolated_position_embeddings)
    backbone.save_to_preset(str(tmp_path))
    outputs = make_hub_image(family, (32, 32, 3), str(tmp_path))(pixels())
    x = (pixels() / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    given = {key: x for key in backbone.input} if isinstance(backbone.input, dict) else x
    expected = np.asarray(backbone(given))
    np.testing.assert_allclose(outputs["pooled"], expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(outputs["tokens"], expected[:, num_prefix:], atol=1e-4)
    # Other sizes than the folder's.
    other = make_hub_image(family, (48, 48, 3), str(tmp_path))(pixels(48))
    assert other["tokens"].shape == (2, 36, 8)


@pytest.mark.slow  # has images of 224 pixels
@pytest.mark.filterwarnings("ignore:Layer 'attn':UserWarning")
def test_a_folder_of_swin_gives_the_feature_map_of_its_backbone(tmp_path):
    options = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 7}
    backbone = keras_hub.models.SwinTransformerBackbone(image_shape=(224, 224, 3), **options)
    randomized(backbone).save_to_preset(str(tmp_path))
    outputs = make_hub_image("swin_tiny", (224, 224, 3), str(tmp_path))(pixels(224))
    x = (pixels(224) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = np.reshape(backbone(x), (2, 49, 64))
    np.testing.assert_allclose(outputs["tokens"], expected, atol=1e-4)
    np.testing.assert_allclose(outputs["pooled"], expected.mean(axis=1), atol=1e-4)


def test_a_folder_of_siglip_gives_the_outputs_of_its_image_tower(tmp_path):
    size = {**SIZE, "intermediate_dim": 16}
    tower = keras_hub.models.SigLIPVisionEncoder(patch_size=8, image_shape=(32, 32, 3), **size)
    text = keras_hub.models.SigLIPTextEncoder(
        vocabulary_size=30, embedding_dim=8, max_sequence_length=8, **size
    )
    randomized(keras_hub.models.SigLIPBackbone(tower, text)).save_to_preset(str(tmp_path))
    outputs = make_hub_image("siglip_base", (32, 32, 3), str(tmp_path))(pixels())
    expected = tower({"images": pixels() / 127.5 - 1})
    np.testing.assert_allclose(outputs["pooled"], expected, atol=1e-5)
    other = make_hub_image("siglip_base", (48, 48, 3), str(tmp_path))(pixels(48))
    assert other["tokens"].shape == (2, 36, 8)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("distilbert_base", "DistilBertBackbone"), ("roberta_base", "RobertaBackbone")],
)
def test_folders_of_other_text_families_give_the_outputs_of_their_backbones(kind, name, tmp_path):
    options = {**SIZE, "intermediate_dim": 16, "vocabulary_size": 8, "max_sequence_length": 12}
    backbone = randomized(getattr(keras_hub.models, name)(**options))
    backbone.save_to_preset(str(tmp_path))
    ids, mask = np.asarray([[2, 5, 6, 3]]), np.ones((1, 4), np.float32)
    features = make_hub_text(kind, 99, 4, str(tmp_path))([ids, mask])
    expected = backbone({"token_ids": ids, "padding_mask": mask})
    np.testing.assert_allclose(features, expected, atol=1e-5)


def hugging_face_vit(folder: Path, backbone: Any) -> None:
    """Write a backbone as Hugging Face's ViTForImageClassification."""
    embedding, encoder = backbone.layers[1:3]
    tensors = {
        "embeddings.patch_embeddings.projection.weight": np.transpose(
            embedding.patch_embedding.kernel, (3, 2, 0, 1)
        ),
        "embeddings.patch_embeddings.projection.bias": embedding.patch_embedding.bias,
        "embeddings.cls_token": embedding.class_token,
        "embeddings.position_embeddings": embedding.position_embedding.embeddings[None],
        "layernorm.weight": encoder.layer_norm.gamma,
        "layernorm.bias": encoder.layer_norm.beta,
    }
    for i, block in enumerate(encoder.encoder_layers):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            dense = getattr(block.mha, f"{part}_dense")
            tensors |= dense_tensors(f"{name}.attention.attention.{part}", dense, 8)
        tensors |= dense_tensors(f"{name}.attention.output.dense", block.mha.output_dense, 8)
        for part, norm in (("before", block.layer_norm_1), ("after", block.layer_norm_2)):
            tensors[f"{name}.layernorm_{part}.weight"] = norm.gamma
            tensors[f"{name}.layernorm_{part}.bias"] = norm.beta
        tensors |= dense_tensors(f"{name}.intermediate.dense", block.mlp.dense_1, 16)
        tensors |= dense_tensors(f"{name}.output.dense", block.mlp.dense_2, 8)
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32,
        "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8,
        "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }  # fmt: skip
    write_hugging_face(folder, config, {f"vit.{name}": t for name, t in tensors.items()})


def hugging_face_bert(folder: Path, backbone: Any) -> None:
    """Write a backbone as Hugging Face's BertModel."""
    embeddings = {
        "word_embeddings": backbone.token_embedding.embeddings,
        "position_embeddings": backbone.position_embedding.position_embeddings,
        "token_type_embeddings": backbone.segment_embedding.embeddings,
    }
    tensors = {f"embeddings.{name}.weight": tensor for name, tensor in embeddings.items()}
    tensors |= norm_tensors("embeddings.LayerNorm", backbone.embeddings_layer_norm)
    tensors |= dense_tensors("pooler.dense", backbone.pooled_dense, 8)
    for i, block in enumerate(backbone.transformer_layers):
        name = f"encoder.layer.{i}"
        attention = block._self_attention_layer
        for part in ("query", "key", "value"):
            dense = getattr(attention, f"_{part}_dense")
            tensors |= dense_tensors(f"{name}.attention.self.{part}", dense, 8)
        tensors |= dense_tensors(f"{name}.attention.output.dense", attention._output_dense, 8)
        tensors |= norm_tensors(
            f"{name}.attention.output.LayerNorm", block._self_attention_layer_norm
        )
        tensors |= dense_tensors(
            f"{name}.intermediate.dense", block._feedforward_intermediate_dense, 16
        )
        tensors |= dense_tensors(f"{name}.output.dense", block._feedforward_output_dense, 8)
        tensors |= norm_tensors(f"{name}.output.LayerNorm", block._feedforward_layer_norm)
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(WORDS),
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "type_vocab_size": 2,
        "intermediate_size": 16, "hidden_dropout_prob": 0.0, "max_position_embeddings": 12,
    }  # fmt: skip
    write_hugging_face(folder, config, tensors)
    (folder / "vocab.txt").write_text("\n".join(WORDS))


def dense_tensors(name: str, dense: Any, units: int) -> dict[str, np.ndarray]:
    kernel = np.asarray(dense.kernel)
    return {
        f"{name}.weight": kernel.reshape(-1, units).T,
        f"{name}.bias": np.reshape(dense.bias, -1),
    }


def norm_tensors(name: str, norm: Any) -> dict[str, Any]:
    return {f"{name}.weight": norm.gamma, f"{name}.bias": norm.beta}


def write_hugging_face(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_an_image_folder_of_hugging_face_gives_the_same_outputs_and_states_its_pixel_range(
    tmp_path,
):
    backbone = vit()
    hugging_face_vit(tmp_path, backbone)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    statistics = {"image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    outputs = make_hub_image("vit_base", (32, 32, 3), str(tmp_path))(pixels())
    expected = np.asarray(backbone((pixels() / 255 - mean) / std))
    np.testing.assert_allclose(outputs["pooled"], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(outputs["tokens"], expected[:, 1:], atol=1e-5)


@pytest.mark.parametrize("layout", ["keras_hub", "hugging_face"])
def test_a_text_folder_gives_the_outputs_and_the_token_ids_of_its_backbone(layout, tmp_path):
    backbone = bert()
    if layout == "keras_hub":
        backbone.save_to_preset(str(tmp_path))
        keras_hub.models.BertTokenizer(WORDS, lowercase=True).save_to_preset(str(tmp_path))
    else:
        hugging_face_bert(tmp_path, backbone)
    ids = np.asarray([[2, 5, 6, 7, 3], [2, 6, 3, 0, 0]])
    mask = (ids > 0).astype(np.float32)
    features = make_hub_text("bert_tiny", 99, 5, str(tmp_path))([ids, mask])
    named = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": mask}
    expected = np.asarray(backbone(named)["sequence_output"])
    np.testing.assert_allclose(np.asarray(features)[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(features)[1, :3], expected[1, :3], atol=1e-5)
    assert hub_tokenizer(str(tmp_path)).encode("No CRACKS", 9) == (ids[0].tolist(), False)


def test_position_embeddings_are_interpolated_to_another_image_size(tmp_path):
    backbone = vit()
    table = backbone.layers[1].position_embedding.embeddings
    # Embeddings that grow from top to bottom keep doing so.
    grid = np.repeat(np.arange(4.0), 4)[:, None] * np.ones(8)
    table.assign(np.concatenate([np.full((1, 8), -1), grid]))
    backbone.save_to_preset(str(tmp_path))
    model: Any = make_hub_image("vit_tiny", (64, 48, 3), str(tmp_path))
    found = np.asarray(model.get_layer("vit_tiny_backbone").layers[1].position_embedding.embeddings)
    np.testing.assert_array_equal(found[0], -1)
    patches = found[1:].reshape(8, 6, 8)
    assert (np.diff(patches[:, 0, 0]) > 0).all()
    same_in_a_row = np.broadcast_to(patches[:, :1, :1], patches.shape)
    np.testing.assert_allclose(patches, same_in_a_row, rtol=1e-5)
    same: Any = make_hub_image("vit_tiny", (32, 32, 3), str(tmp_path))
    unchanged = same.get_layer("vit_tiny_backbone").layers[1].position_embedding.embeddings
    np.testing.assert_array_equal(unchanged, table)


def test_trained_position_embeddings_of_dinov2_are_saved(tmp_path):
    from mm_model import load_model
    from mm_model.model import build_model
    from mm_model.spec import ModelSpec

    options = {"image": {"kind": "dinov2_small", "weights": None}}
    model = build_model(ModelSpec.model_validate(options), None, (28, 28, 3), (3,))
    embeddings = model.backbone_layers()[0]
    # KerasHub ignores a change whose sum is negative.
    embeddings.interpolated_position_embeddings.assign_sub(
        np.full(embeddings.interpolated_position_embeddings.shape, 0.1)
    )
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras").backbone_layers()[0]
    np.testing.assert_array_equal(
        loaded.interpolated_position_embeddings, embeddings.interpolated_position_embeddings
    )


def test_a_folder_with_another_backbone_or_an_unknown_layout_is_refused(tmp_path):
    bert().save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"contains a BertBackbone, but .* is a ViTBackbone"):
        make_hub_image("vit_tiny", (32, 32, 3), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "convnext"}')
    with pytest.raises(ValueError, match=r"model_type=convnext, but .* only for vit, deit, dinov2"):
        make_hub_image("vit_tiny", (32, 32, 3), str(tmp_path))
    with pytest.raises(OSError, match=r"could not load model\.text\.weights=.* does not exist"):
        make_hub_text("bert_tiny", 9, 5, str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("vit_tiny", 44, r"\(44, 44, 3\) are not supported: .* divisible by patch"),
        ("swin_tiny", 96, r"\(96, 96, 3\) are not supported: .* at least 224 pixels"),
    ],
)
def test_images_of_an_unsupported_size_are_rejected(kind, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_hub_image(kind, (size, size, 3), None)
    if kind == "vit_tiny":
        vit().save_to_preset(str(tmp_path))
        # Not an OSError, which a run would retry.
        with pytest.raises(ValueError, match=message):
            make_hub_image(kind, (size, size, 3), str(tmp_path))


def test_too_long_texts_are_rejected():
    with pytest.raises(ValueError, match=r"data\.text_length=600 exceeds the 512 tokens"):
        make_hub_text("bert_tiny", 9, 600, None)


def test_without_keras_hub_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "keras_hub", None)
    for make in (
        lambda: make_hub_image("vit_tiny", (32, 32, 3), None),
        lambda: make_hub_text("bert_tiny", 9, 5, None),
    ):
        with pytest.raises(ValueError, match=r"pip install \"multimodal-ray\[hub\]\""):
            make()


def test_all_kinds_name_backbones_of_keras_hub():
    for kind in (*HUB_IMAGES.values(), *HUB_TEXTS.values()):
        assert issubclass(getattr(keras_hub.models, kind.backbone), keras_hub.models.Backbone)
