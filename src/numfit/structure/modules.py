"""What a decoder is, told from its modules: the one thing that names and config cannot hand out, the layers themselves."""

from __future__ import annotations

from torch import nn


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each decoder layer: the outermost list of as many modules as the configuration has layers.

    Returns:
        [] when there is no such list.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    count = getattr(config, "num_hidden_layers", None)
    lists = [(name.count("."), name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(depth, name, m) for depth, name, m in lists if len(m) == count]
    if not fitting:
        return []
    _, name, layers = min(fitting, key=lambda item: item[0])
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]
