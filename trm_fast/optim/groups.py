"""Parameter groups by component of a model, or by the algorithm that suits each parameter."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Group = dict[str, Any]
Member = nn.Module | Tensor
Members = Member | Iterable[Member]

OTHER = "other"


def component_groups(
    model: nn.Module,
    components: Mapping[str, Members],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Group]:
    """Returns the parameters of a model as one named group per component.

    Parameters without gradient are left out; those that are thawed later are added with
    ``add_param_group``. A parameter that several modules share counts once, under its first name.

    Args:
        model: whose ``named_parameters()`` are divided.
        components: name to a module of the model, a parameter, or several; the rest becomes the
            component "other", if there is any.
        options: name of a component, "other" included, to options of its group.

    Returns:
        Groups for an optimizer, in the order of ``components``, each with its name under the key
        "component".

    Raises:
        ValueError: a component has a module or parameter that is not of the model or nothing to
            train, two components claim one parameter, or options are given for no component.

    Example:
        >>> groups = component_groups(
        ...     model,
        ...     {"core": [model.core, model.backbone], "halting": model.halt},
        ...     {"core": {"alpha": 0.98, "lamb": 2.0}, "halting": {"filter": None, "lr": 5e-4}},
        ... )
        >>> optimizer = trm_fast.GrokFastAdamW(groups, lr=3e-4)
    """
    options = options or {}
    _check_component_names(components, options)
    owner: dict[Tensor, str] = {}
    for component, members in components.items():
        for name, param in _members(model, members, f"component_groups: {component!r}"):
            if owner.setdefault(param, component) != component:
                raise ValueError(
                    "component_groups: each parameter must be in one component; got "
                    f"{name!r} in {owner[param]!r} and {component!r}"
                )
    divided: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in (*components, OTHER)}
    for name, param in _trainable(model):
        divided[owner.get(param, OTHER)].append((name, param))
    empty = [name for name in components if not divided[name]]
    if empty:
        raise ValueError(
            f"component_groups: each component must have parameters to train; got none in {empty}"
        )
    return [
        {"params": params, "component": name, **options.get(name, {})}
        for name, params in divided.items()
        if params
    ]


def _check_component_names(
    components: Mapping[str, Members], options: Mapping[str, Mapping[str, Any]]
) -> None:
    if OTHER in components:
        raise ValueError(f"component_groups: {OTHER!r} is the rest; got it as a component")
    unknown = [name for name in options if name not in components and name != OTHER]
    if unknown:
        known = [*components, OTHER]
        raise ValueError(f"component_groups: options must be for one of {known}; got {unknown}")
    for name, chosen in options.items():
        taken = chosen.keys() & {"params", "param_names", "component"}
        if taken:
            raise ValueError(
                f"component_groups: options of {name!r} must be those of an optimizer; got "
                f"{sorted(taken)}"
            )


def split_params(
    model: nn.Module,
    heads: Members,
    *,
    matrices: Members = (),
    exclude: Members = (),
) -> list[Group]:
    """Divides the parameters of a model into hidden matrices, for Muon, and the rest, for AdamW.

    Hidden matrices are the weights of linear layers, of convolutions with ``groups=1`` and of
    ``nn.MultiheadAttention``. The rest is everything else: embeddings, and weights tied to one;
    biases, norms and all else of fewer than two dimensions; and parameters that belong directly to
    a module of another type, such as learned positions or initial states, whatever their shape.

    What a module is for does not show in its type, and its name proves nothing, so the output and
    halting heads have to be named. Look at ``describe`` of the result once for each model.
    Parameters without gradient are left out.

    Args:
        model: whose ``named_parameters()`` are divided.
        heads: modules that turn hidden states into predictions (output, halting, value), or their
            parameters; ``()`` if there is none but a tied one.
        matrices: parameters that are hidden matrices although their module's type does not say so,
            or modules of which every parameter of two or more dimensions is one.
        exclude: more modules or parameters for the rest.

    Returns:
        Groups with the key "algorithm", first "muon", then "adamw"; a group that would be empty is
        left out.

    Raises:
        ValueError: something that is given is not of the model, contradicts itself, or leaves no
            hidden matrix.

    Example:
        >>> groups = split_params(model, heads=[model.lm_head, model.q_head])
        >>> print(describe(groups))
        >>> optimizer = trm_fast.MuGrokfast(groups)
    """
    rest = {param for _, param in _members(model, exclude, "split_params: exclude")}
    rest |= {param for _, param in _members(model, heads, "split_params: heads")}
    given = _listed(matrices)
    named: set[Tensor] = set()
    for name, param in _members(model, given, "split_params: matrices"):
        if param.ndim >= 2:
            named.add(param)
        if param in rest or (param.ndim < 2 and any(param is member for member in given)):
            raise ValueError(
                "split_params: matrices must have 2 or more dimensions and be neither in heads nor "
                f"in exclude; got {name!r} of shape {tuple(param.shape)}"
            )
    hidden = _typed_matrices(model) - rest | named
    muon = [(name, param) for name, param in _trainable(model) if param in hidden]
    adamw = [(name, param) for name, param in _trainable(model) if param not in hidden]
    if not muon:
        raise ValueError(
            f"split_params: the model must have a hidden matrix to train; got {len(adamw)} other "
            "parameters: name matrices of custom modules in `matrices`"
        )
    groups = [{"params": muon, "algorithm": "muon"}, {"params": adamw, "algorithm": "adamw"}]
    return [group for group in groups if group["params"]]


def _typed_matrices(model: nn.Module) -> set[Tensor]:
    """Returns the parameters that are matrices by the types of all modules that they belong to."""
    matrices: set[Tensor] = set()
    others: set[Tensor] = set()
    for module in model.modules():
        weights = _weights(module)
        matrices |= weights
        others |= {*module.parameters(recurse=False)} - weights
    return matrices - others


def _weights(module: nn.Module) -> set[Tensor]:
    names: tuple[str, ...] = ()
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1):
        names = ("weight",)
    return {param for name, param in module.named_parameters(recurse=False) if name in names}


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _listed(members: Members) -> list[Member]:
    # A ModuleList is one module, though it can be iterated over.
    return [members] if isinstance(members, (nn.Module, Tensor)) else list(members)


def _members(model: nn.Module, members: Members, argument: str) -> list[tuple[str, Tensor]]:
    """Returns the parameters of modules, and single ones, with their names in ``model``.

    Raises:
        ValueError: one of them is not of the model.
    """
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    found: dict[Tensor, str] = {}
    for member in _listed(members):
        # A slice of a ModuleList is a new module, so its parameters tell where it belongs.
        params = list(member.parameters()) if isinstance(member, nn.Module) else [member]
        if all(isinstance(param, Tensor) and param in names for param in params):
            found |= {param: names[param] for param in params}
        else:
            kind = type(member).__name__
            shape = f" of shape {tuple(member.shape)}" if isinstance(member, Tensor) else ""
            raise ValueError(
                f"{argument} must hold modules and parameters of the model; got a {kind}{shape} "
                "that is not"
            )
    return [(name, param) for param, name in found.items()]


def describe(groups: Sequence[Group]) -> str:
    """Returns a table of all parameters: group, shape and name, and a last line per group.

    Args:
        groups: what ``component_groups`` or ``split_params`` returned, or the ``param_groups`` of
            an optimizer. A group is called after its "algorithm" or "component", else by its
            position.
    """
    rows = [("group", "shape", "name")]
    totals = []
    for position, group in enumerate(groups):
        label = str(group.get("algorithm", group.get("component", position)))
        named = [*_named(group)]
        rows += [(label, " x ".join(map(str, p.shape)) or "scalar", name) for name, p in named]
        count = sum(param.numel() for _, param in named)
        totals.append(f"{label}: {len(named)} tensors, {count:,} parameters")
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}" for row in rows]
    return "\n".join([*lines, *totals])


def _named(group: Group) -> Iterator[tuple[str, Tensor]]:
    names = group.get("param_names", ["-"] * len(group["params"]))
    for name, param in zip(names, group["params"], strict=True):
        yield param if isinstance(param, tuple) else (name, param)
