"""Bases that bring code of their own: refused unless asked for, and checked like any other where they run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedtune.config.load import load_config
from fedtune.config.schema import BUILTIN_TINY, AdapterConfig, ModelConfig
from fedtune.errors import ConfigError, MissingError
from fedtune.models.base import check_files, load_base, load_tokenizer
from fedtune.models.hub import resolve_base
from fedtune.models.shapes import adapter_shapes

MODELLING = '''
from pathlib import Path

Path({marker!r}).touch()

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class {name}Config(PreTrainedConfig):
    model_type = "{kind}"

    def __init__(self, vocab_size=858, hidden_size=32, causal=True, eos_token_id=2, **options):
        self.vocab_size, self.hidden_size, self.causal = vocab_size, hidden_size, causal
        super().__init__(eos_token_id=eos_token_id, **options)


class {name}ForCausalLM(PreTrainedModel, GenerationMixin):
    """Adds to every token the mean of the tokens up to it, or of all tokens."""

    config_class = {name}Config
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.q_proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **options):
        hidden = self.embed_tokens(input_ids)
        mixed = self.q_proj(hidden)
        if self.config.causal:
            places = torch.arange(1, mixed.shape[1] + 1, device=mixed.device)[:, None]
            mixed = mixed.cumsum(dim=1) / places
        else:
            mixed = mixed.mean(dim=1, keepdim=True)
        return CausalLMOutput(logits=self.lm_head(hidden + mixed))
'''

TOKENIZER = """
from pathlib import Path

Path({marker!r}).touch()

from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Own:
    """A folder with a model, and where asked a tokenizer, that has code of its own; `ran`: whether any of it ran."""

    def __init__(self, tmp_path: Path, *, kind: str = "own_kind", causal: bool = True, tokenizer: bool = False) -> None:
        from safetensors.torch import save_file

        self.folder, self.marker = tmp_path / "own", tmp_path / "ran"
        self.folder.mkdir()
        name = "".join(part.title() for part in kind.split("_"))
        code = MODELLING.format(marker=str(self.marker), name=name, kind=kind)
        (self.folder / "modeling_own.py").write_text(code)
        self.table: dict[str, Any] = {
            "model_type": kind,
            "architectures": [f"{name}ForCausalLM"],
            "auto_map": {
                "AutoConfig": f"modeling_own.{name}Config",
                "AutoModelForCausalLM": f"modeling_own.{name}ForCausalLM",
            },
            "causal": causal,
        }
        generator = torch.Generator().manual_seed(0)
        shapes = {"embed_tokens.weight": (858, 32), "q_proj.weight": (32, 32), "lm_head.weight": (858, 32)}
        self.tensors = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        tiny = resolve_base(ModelConfig(base=BUILTIN_TINY)).folder
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, self.folder)
        if tokenizer:
            (self.folder / "tokenization_own.py").write_text(TOKENIZER.format(marker=str(self.marker)))
            self.edit("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=self.tokenizer_map())
        self.write()

    def tokenizer_map(self, repository: str = "") -> dict[str, Any]:
        return {"AutoTokenizer": [None, f"{repository}tokenization_own.OwnTokenizer"]}

    def write(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.table))

    def edit(self, file: str, **values: object) -> None:
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    @property
    def ran(self) -> bool:
        return self.marker.exists()

    def config(self, **options: object) -> ModelConfig:
        return ModelConfig(base=str(self.folder), **{"quantization": "none", **options})


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code that it runs into one folder for all processes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def refuse(own: Own, path: str, words: str, **options: object) -> None:
    """Everything that reads a base refuses this one with one sentence, and runs none of its code."""
    config = own.config(**options)
    doors = [
        lambda: load_base(config),
        lambda: load_tokenizer(config),
        lambda: adapter_shapes(config, AdapterConfig(targets=("q_proj",)), None),
        lambda: check_files(config, own.folder),
    ]
    for door in doors:
        with pytest.raises(ConfigError, match=words) as caught:
            door()
        assert [problem.path for problem in caught.value.problems] == [path]
        assert caught.value.exit_code == 2
        assert not own.ran


def test_code_never_runs_unasked(tmp_path: Path) -> None:
    refuse(Own(tmp_path), "model.trust_remote_code", "this model runs code of its own")


def test_code_of_a_folder_runs_on_request_and_its_weights_are_checked(tmp_path: Path) -> None:
    own = Own(tmp_path)
    config = own.config(trust_remote_code=True)
    base = load_base(config)
    assert own.ran
    assert type(base.model).__name__ == "OwnKindForCausalLM"
    torch.testing.assert_close(base.model.lm_head.weight, own.tensors["lm_head.weight"])
    shapes = adapter_shapes(config, AdapterConfig(rank=2, targets=("q_proj",)), None)
    assert list(shapes.values()) == [(2, 32), (32, 2)]


def test_a_folder_needs_no_revision_and_the_hub_does(tmp_path: Path) -> None:
    own = Own(tmp_path)
    setting = ["model.trust_remote_code=true"]
    assert load_config(settings=[f'model.base="{own.folder}"', *setting]).config.model.trust_remote_code
    with pytest.raises(ConfigError, match="40 hex digits"):
        load_config(settings=['model.base="owner/name"', *setting])
    load_config(settings=['model.base="owner/name"', f'model.revision="{"a" * 40}"', *setting])
    with pytest.raises(ConfigError, match="40 hex digits"):
        resolve_base(own.config().model_copy(update={"base": "owner/name", "trust_remote_code": True}))


def test_own_code_that_is_not_causal(tmp_path: Path) -> None:
    own = Own(tmp_path, kind="own_encoder", causal=False)
    with pytest.raises(ConfigError, match=r"\(OwnEncoderForCausalLM\) is not causal"):
        load_base(own.config(trust_remote_code=True))


def test_own_code_with_a_weight_missing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    own = Own(tmp_path, kind="own_partial")
    del own.tensors["q_proj.weight"]
    save_file(own.tensors, own.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=r"missing: q_proj\.weight"):
        load_base(own.config(trust_remote_code=True))


def test_own_code_that_cannot_generate(tmp_path: Path) -> None:
    own = Own(tmp_path, kind="own_scorer")
    code = own.folder / "modeling_own.py"
    code.write_text(code.read_text().replace(", GenerationMixin):", "):"))
    config = own.config(trust_remote_code=True)
    for door in (lambda: load_base(config), lambda: adapter_shapes(config, AdapterConfig(targets=("q_proj",)), None)):
        with pytest.raises(ConfigError, match="cannot generate text"):
            door()


@pytest.mark.parametrize("code", ["import no_such_package", "raise SystemError('no')", "def (", ""])
def test_own_code_that_fails_is_one_sentence(tmp_path: Path, code: str) -> None:
    own = Own(tmp_path, kind="own_broken")
    (own.folder / "modeling_own.py").write_text(code)
    with pytest.raises(MissingError) as caught:
        load_base(own.config(trust_remote_code=True))
    assert "\n" not in str(caught.value)


def test_code_of_a_third_repository_never_runs(tmp_path: Path) -> None:
    own = Own(tmp_path)
    own.table["auto_map"] = {key: f"somebody/else--{name}" for key, name in own.table["auto_map"].items()}
    own.write()
    refuse(own, "model.base", "its code lies in another repository", trust_remote_code=True)
    own.edit("config.json", model_type="llama", auto_map={}, text_config={"auto_map": {"AutoConfig": "a/b--c.D"}})
    refuse(own, "model.base", "its code lies in another repository", trust_remote_code=True)


def test_a_tokenizer_of_a_third_repository_never_runs(tmp_path: Path) -> None:
    own = Own(tmp_path, tokenizer=True)
    own.edit("tokenizer_config.json", auto_map=own.tokenizer_map("somebody/else--"))
    refuse(own, "model.base", "its code lies in another repository", trust_remote_code=True)
    own.edit("tokenizer_config.json", auto_map=["somebody/else--tokenization_own.OwnTokenizer", None])
    refuse(own, "model.base", "its code lies in another repository", trust_remote_code=True)


def llama_with_own_tokenizer(tmp_path: Path) -> Own:
    """A model that transformers knows, with a tokenizer that has code of its own."""
    own = Own(tmp_path, tokenizer=True)
    tiny = resolve_base(ModelConfig(base=BUILTIN_TINY)).folder
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny / file, own.folder)
    return own


def test_a_tokenizers_code_runs_on_request_only(tmp_path: Path) -> None:
    own = llama_with_own_tokenizer(tmp_path)
    config = own.config()
    for door in (lambda: load_base(config), lambda: load_tokenizer(config), lambda: check_files(config, own.folder)):
        with pytest.raises(
            ConfigError, match=r"model\.trust_remote_code: the tokenizer of this model runs code of its own"
        ):
            door()
        assert not own.ran
    assert type(load_base(own.config(trust_remote_code=True)).tokenizer).__name__ == "OwnTokenizer"
    assert own.ran


def test_a_known_tokenizer_class_is_used_instead_of_the_models_own(tmp_path: Path, caplog: Any) -> None:
    own = llama_with_own_tokenizer(tmp_path)
    own.edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(own.config()).get_vocab() == load_tokenizer(ModelConfig(base=BUILTIN_TINY)).get_vocab()
    assert "brings code of its own (tokenization_own.OwnTokenizer), which does not run" in caplog.text
    assert not own.ran


def test_a_tokenizer_that_only_its_own_code_reads_is_refused(tmp_path: Path) -> None:
    own = llama_with_own_tokenizer(tmp_path)
    (own.folder / "tokenizer.json").rename(own.folder / "vocabulary.own")
    config = own.config()
    for door in (lambda: load_base(config), lambda: load_tokenizer(config), lambda: check_files(config, own.folder)):
        with pytest.raises(
            ConfigError, match=r"model\.trust_remote_code: the tokenizer of this model runs code of its own"
        ):
            door()
        assert not own.ran


def test_a_known_type_with_code_of_its_own_uses_transformers_class(tmp_path: Path, caplog: Any) -> None:
    own = llama_with_own_tokenizer(tmp_path)
    own.edit("config.json", auto_map={"AutoConfig": "modeling_own.OwnKindConfig"})
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(ModelConfig(base=BUILTIN_TINY)).folder)
    tokenizer.save_pretrained(own.folder)
    base = load_base(own.config())
    assert type(base.model).__module__.startswith("transformers.")
    assert not own.ran
    assert "brings code of its own (modeling_own.OwnKindConfig), which does not run" in caplog.text
