"""`hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION` and `hf:path/to/folder`: image classifiers of Hugging Face's transformers.

The weights come with the name, as safetensors only, from a folder, the local cache, or the hub. Code from a repository
never runs (`trust_remote_code` is False). The normalisation is that of the image processor beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import DodistillError
from ...files import read_object
from .shared import Built, Space, fitting, require_classes, unreachable

#: What is fetched of a repository.
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors", "model-*.safetensors",
         "model.safetensors.index.json")  # fmt: skip


def build(
    name: str, classes: int | None, channels: int | None, size: Any, pretrained: bool, config: Mapping[str, Any] | None
) -> Built:
    """The network with its own weights, or a fresh one of the same architecture for `classes`, `channels` and `size`.

    With `config` (of a saved student), the name is not looked up.
    """
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise DodistillError(f"hf:{name} needs transformers ({error}): pip install 'dodistill[hf]'") from error
    folder = None if config is not None else _folder(name, pretrained)
    with _quiet(transformers):
        its = _config(transformers, name, folder, config)
        if pretrained:
            assert folder is not None
            net = _published(transformers, name, folder, its)
            require_classes(f"hf:{name}", its.num_labels, classes)
            if channels not in (None, getattr(its, "num_channels", channels)):
                raise DodistillError(f"hf:{name} takes {its.num_channels} channels, not {channels}; give such images.")
        else:
            if classes is not None:
                its.num_labels = classes
            for key, value in (("num_channels", channels), ("image_size", size)):
                if value is not None and hasattr(its, key):
                    setattr(its, key, value)
            auto: Any = transformers.AutoModelForImageClassification
            net = auto.from_config(its, trust_remote_code=False)
    takes = getattr(its, "num_channels", None) or channels
    space, side = (None, None) if folder is None else _processor(folder, name, takes)
    side = side or getattr(its, "image_size", None)
    return Built(
        net.float(), space, its.num_labels, takes, side if pretrained else None,
        config=json.loads(its.to_json_string()),
    )  # fmt: skip


def _folder(name: str, pretrained: bool) -> Path:
    """The folder with the files: a local one, that in the cache, or after a download."""
    local = Path(name).expanduser()
    if local.is_dir():
        _require_files(local, name, pretrained)
        return local
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise DodistillError(
            f"hf:{name} is neither a folder (looked for from {Path.cwd()}) nor a name on the hub, OWNER/NAME; correct "
            "it."
        )
    import huggingface_hub

    repo, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(FILES)}
    try:
        cached = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **wanted))
        _require_files(cached, name, pretrained)
        return cached
    except Exception:  # it is not in the cache, or not all of it
        pass
    try:
        fetched = Path(huggingface_hub.snapshot_download(repo, **wanted))
    except Exception as error:  # the hub's client raises many kinds
        fetch = f"or download it once where there is one (hf download {repo}) and give its folder, hf:path/to/folder"
        raise unreachable(f"hf:{name}", error, fetch) from error
    _require_files(fetched, name, pretrained)
    return fetched


def _require_files(folder: Path, name: str, pretrained: bool) -> None:
    if not (folder / "config.json").is_file():
        raise DodistillError(f"hf:{name} has no config.json, so it is no model of transformers; name another.")
    if pretrained and not any(folder.glob("*.safetensors")):
        raise DodistillError(
            f"hf:{name} has no weights in safetensors; other formats can run code. Convert them once yourself, by "
            "save_pretrained, and give the folder."
        )


def _config(transformers: Any, name: str, folder: Path | None, config: Mapping[str, Any] | None) -> Any:
    try:
        if config is not None:
            return transformers.AutoConfig.for_model(**config)
        found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # many kinds, for what a file may lack
        reason = str(error).strip().partition("\n")[0]
        raise DodistillError(
            f"transformers cannot read the config of hf:{name} ({reason}); dodistill runs no code of a repository: "
            "name a model that transformers knows, or write a factory, path/to/file.py:factory."
        ) from error
    if found.model_type == "timm_wrapper":
        short = name.rpartition("/")[2].partition("@")[0]
        raise DodistillError(f"hf:{name} is a network of timm; give timm:{short} with weights `pretrained`.")
    return found


def _published(transformers: Any, name: str, folder: Path, config: Any) -> Any:
    try:
        net, report = transformers.AutoModelForImageClassification.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DodistillError(f"hf:{name} is no image classifier of transformers ({reason}); name another.") from error
    lacking = sorted({*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])})
    if lacking:
        raise DodistillError(
            f"the weights of hf:{name} lack {', '.join(lacking[:3])}{' and more' if len(lacking) > 3 else ''}, which "
            "would be random; name a model that is trained as a classifier."
        )
    return net


def _processor(folder: Path, name: str, channels: int | None) -> tuple[Space | None, Any]:
    """(normalisation of images in [0, 1], image size) of the image processor; None for what it does not say."""
    given: Mapping[str, Any] = {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            found = read_object(folder / file, "give another folder")
            given = found.get("image_processor", found)
            break
    if not isinstance(given, Mapping) or not given:
        return None, None
    if given.get("do_flip_channel_order"):
        raise DodistillError(
            f"hf:{name} reads its channels as blue, green, red; write a factory, path/to/file.py:factory, that turns "
            "them around."
        )
    crops = given.get("crop_size") is not None and given.get("do_center_crop", True)
    size = given.get("crop_size") if crops else given.get("size")
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if isinstance(size, tuple) and size[0] == size[1]:
        size = size[0]
    good = isinstance(size, int) or (isinstance(size, tuple) and all(isinstance(s, int) for s in size))
    scale = 255.0 * float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 255.0
    offset = 1.0 if given.get("rescale_offset") else 0.0
    mean, std = given.get("image_mean"), given.get("image_std")
    if not given.get("do_normalize", mean is not None):
        mean, std = [0.0], [1.0]
    if not isinstance(mean, list) or not isinstance(std, list):
        return None, size if good else None
    # The network reads (scale x - offset - mean) / std for x in [0, 1].
    space = fitting([(m + offset) / scale for m in mean], [s / scale for s in std], channels)
    return space, size if good else None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar and warnings within the block; what they say becomes an error here."""
    log = transformers.utils.logging
    shows, level = log.is_progress_bar_enabled(), log.get_verbosity()
    try:
        log.disable_progress_bar()
        log.set_verbosity_error()
        yield
    finally:
        log.set_verbosity(level)
        if shows:
            log.enable_progress_bar()
