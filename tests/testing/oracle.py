"""The published layers in numpy float64, written anew, and random cases of them."""

import numpy as np


def norm(x, weight, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def dispatch(masks, function):
  """Runs function(k, token ids) per modality; the lowest mask wins."""
  owner = masks.argmax(0)
  covered = masks.any(0)
  for k in range(len(masks)):
    tokens = np.flatnonzero(covered & (owner == k))
    if len(tokens):
      function(k, tokens)


def attention(x, masks, w, cfg, mask):
  heads, width = cfg["n_heads"], cfg["head_dim"]
  q, k, v = (np.zeros((len(x), heads, width)) for _ in range(3))

  def project(m, tokens):
    for name, out in (("q", q), ("k", k), ("v", v)):
      matrix = w[f"local_experts_w{name}.{m}.weight"]
      y = (x[tokens] @ matrix.T).reshape(-1, heads, width)
      if cfg["qk_normalization"] and name != "v":
        weight = w[f"local_experts_{name}_normalization.{m}.weight"]
        y = norm(y, weight, cfg["qk_norm_eps"])
      out[tokens] = y

  dispatch(masks, project)
  rows = (cfg["batch"], cfg["seq"], heads, width)
  q, k, v = (a.reshape(rows) for a in (q, k, v))
  scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(width)
  scores = scores + (0 if mask is None else mask)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  mixed = np.einsum("bhij,bjhd->bihd", p, v).reshape(len(x), -1)
  out = np.zeros_like(x)

  def leave(m, tokens):
    y = mixed[tokens] @ w[f"local_experts_wo.{m}.weight"].T
    weight = w[f"local_experts_attention_norm.{m}.weight"]
    out[tokens] = norm(y, weight, 1e-5)

  dispatch(masks, leave)
  return out


def feed_forward(x, masks, w):
  out = np.zeros_like(x)

  def run(m, tokens):
    w1, w2, w3 = (w[f"local_experts.{m}.w{i}.weight"] for i in (1, 2, 3))
    gate = x[tokens] @ w1.T
    y = (gate / (1 + np.exp(-gate)) * (x[tokens] @ w3.T)) @ w2.T
    out[tokens] = norm(y, w[f"local_experts_ffn_norm.{m}.weight"], 1e-5)

  dispatch(masks, run)
  return out


def finished(name, rng, x, masks, w, cfg, run, mask=None):
  """Arrays of one case, with the gradient of x by central differences."""
  cotangent = rng.normal(size=x.shape)
  slope = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[i] = 1e-5
    slope[i] = ((run(x + step) - run(x - step)) * cotangent).sum() / 2e-5
  arrays = {
    "x": x.astype(np.float32),
    "modality_masks": masks,
    "cotangent": cotangent.astype(np.float32),
    "out": run(x).astype(np.float32),
    "out_f64": run(x),
    "grad/x": slope.astype(np.float32),
  }
  if mask is not None:
    arrays["attn_mask"] = mask.astype(np.float32)
  arrays |= {f"w/{k}": v.astype(np.float32) for k, v in w.items()}
  arrays |= {f"cfg/{k}": np.asarray(v) for k, v in cfg.items()}
  return {f"{name}/{k}": v for k, v in arrays.items()}


def random_masks(rng, modalities, tokens, *, overlap=False, holes=False):
  owner = rng.integers(modalities, size=tokens)
  masks = owner[None] == np.arange(modalities)[:, None]
  if overlap:
    masks |= rng.random(masks.shape) < 0.3
  if holes:
    masks[:, rng.random(tokens) < 0.2] = False
  return masks


def single(a):
  """The float32 that a file keeps, in float64."""
  return a.astype(np.float32).astype(np.float64)


def interval_mask(rng, seq, kind):
  column = np.arange(seq)
  if kind == "window":
    start, end = np.maximum(column - 2, 0), column + 1
  elif kind == "ahead":
    start, end = column // 2, np.minimum(column + 3, seq)
  elif kind == "blocks":
    start, end = column // 3 * 3, np.minimum(column // 3 * 3 + 3, seq)
  elif kind == "causal":
    start, end = 0 * column, column + 1
  else:
    return None
  seen = (column >= start[:, None]) & (column < end[:, None])
  return np.where(seen, 0.0, -np.inf)


def attention_cases(rng):
  """Six cases: [dim, heads, width, modalities, batch, seq], masks, norms."""
  for i, (dim, heads, width, m, batch, seq, kind, qk) in enumerate(
    [
      (6, 3, 5, 4, 1, 7, "window", 1),
      (10, 1, 4, 1, 3, 5, "ahead", 0),
      (8, 5, 1, 2, 2, 6, "blocks", 0),
      (5, 2, 3, 5, 1, 9, "causal", 1),
      (7, 4, 6, 3, 2, 4, "none", 1),
      (4, 2, 8, 2, 1, 1, "none", 0),
    ]
  ):
    tokens, hd = batch * seq, heads * width
    masks = random_masks(rng, m, tokens, overlap=i % 2 == 1, holes=m > 2)
    w = {}
    for k in range(m):
      for name, shape in (("q", (hd, dim)), ("k", (hd, dim)), ("v", (hd, dim))):
        w[f"local_experts_w{name}.{k}.weight"] = rng.normal(size=shape)
      w[f"local_experts_wo.{k}.weight"] = rng.normal(size=(dim, hd))
      w[f"local_experts_attention_norm.{k}.weight"] = rng.normal(size=dim)
      if qk:
        for name in "qk":
          key = f"local_experts_{name}_normalization.{k}.weight"
          w[key] = rng.normal(size=width)
    w = {k: single(v / np.sqrt(v.shape[-1])) for k, v in w.items()}
    cfg = {"batch": batch, "dim": dim, "head_dim": width, "n_heads": heads}
    cfg |= {"n_modalities": m, "qk_normalization": qk, "seq": seq}
    cfg |= {"qk_norm_eps": 1e-2} if qk else {}
    x = single(
      np.where(masks.any(0)[:, None], rng.normal(size=(tokens, dim)), 0)
    )
    mask = interval_mask(rng, seq, kind)

    def run(x, masks=masks, w=w, cfg=cfg, mask=mask):
      return attention(x, masks, w, cfg, mask)

    yield from finished(f"case{i}", rng, x, masks, w, cfg, run, mask).items()


def feed_forward_cases(rng):
  """Three cases of other widths and numbers of modalities."""
  for i, (dim, width, m, tokens) in enumerate(
    [(5, 3, 4, 11), (12, 7, 1, 6), (3, 20, 6, 9)]
  ):
    masks = random_masks(rng, m, tokens, overlap=i == 2, holes=i == 0)
    w = {}
    for k in range(m):
      shapes = (
        ("w1", (width, dim)),
        ("w3", (width, dim)),
        ("w2", (dim, width)),
      )
      for name, shape in shapes:
        w[f"local_experts.{k}.{name}.weight"] = rng.normal(size=shape)
      w[f"local_experts_ffn_norm.{k}.weight"] = rng.normal(size=dim)
    w = {k: single(v) for k, v in w.items()}
    x = single(
      np.where(masks.any(0)[:, None], rng.normal(size=(tokens, dim)), 0)
    )

    def run(x, masks=masks, w=w):
      return feed_forward(x, masks, w)

    cfg = {"dim": dim, "hidden_dim_actual": width, "n_modalities": m}
    yield from finished(f"case{i}", rng, x, masks, w, cfg, run).items()
