"""ComfyUI's CLIP as its custom nodes meet it: names, signatures, and how a patcher's object patches come and go.

Written for the tests after the interface of ComfyUI (comfy/sd.py, sd1_clip.py, clip_model.py, model_patcher.py);
none of its code is in here.
"""

import copy
from functools import reduce
from types import SimpleNamespace

import torch
from torch import nn


def attention(query, key, value, heads, mask):
    """In place of ComfyUI's optimized_attention."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class CLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None, optimized_attention=None):
        out = optimized_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask)
        return self.out_proj(out)


class CLIPLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width) for _ in range(2))
        self.self_attn = CLIPAttention(width, config.num_attention_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x, mask=None, optimized_attention=None):
        x += self.self_attn(self.layer_norm1(x), mask, optimized_attention)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


class CLIPTextModel_(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_tokens=None, attention_mask=None, embeds=None):
        """ComfyUI has looked the tokens up before: the model sees `embeds` alone."""
        x = embeds + self.embeddings.position_embedding.weight
        mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max).triu(1)
        for layer in self.encoder.layers:
            x = layer(x, mask, attention)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.text_model = CLIPTextModel_(config)

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)


class SDClipModel(nn.Module):
    """Takes lists of tokens: ids, or the vectors of textual inversions."""

    def __init__(self, config):
        super().__init__()
        self.transformer = CLIPTextModel(config)

    def forward(self, tokens):
        table = self.transformer.text_model.embeddings.token_embedding.weight
        embeds = torch.stack([torch.stack([table[t] if isinstance(t, int) else t for t in row]) for row in tokens])
        return self.transformer(None, None, embeds=embeds)


class ModelPatcher:
    """Clones share the model and the backup: what one put in, another takes out when it is loaded."""

    def __init__(self, model):
        self.model = model
        self.object_patches = {}
        self.object_patches_backup = {}

    def clone(self):
        other = copy.copy(self)
        other.object_patches = self.object_patches.copy()
        return other

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def get_model_object(self, name):
        for patches in (self.object_patches, self.object_patches_backup):
            if name in patches:
                return patches[name]
        return reduce(getattr, name.split("."), self.model)

    def load(self):
        for name, value in self.object_patches_backup.items():
            self._set(name, value)
        self.object_patches_backup.clear()
        for name, value in self.object_patches.items():
            self.object_patches_backup[name] = self._set(name, value)

    def _set(self, name, value):
        path, _, leaf = name.rpartition(".")
        owner = reduce(getattr, path.split("."), self.model)
        before = getattr(owner, leaf)
        setattr(owner, leaf, value)
        return before


class CLIP:
    """Made of a transformers CLIPTextModel's weights; with two names, of them twice, side by side as in SDXL."""

    def __init__(self, text_encoder, tokenizer, names=("clip_l",)):
        self.cond_stage_model = nn.ModuleDict({name: SDClipModel(text_encoder.config) for name in names})
        for encoder in self.cond_stage_model.values():
            encoder.transformer.load_state_dict(text_encoder.state_dict())
        self.tokenizer = SimpleNamespace(**{name: SimpleNamespace(tokenizer=tokenizer) for name in names})
        self.patcher = ModelPatcher(self.cond_stage_model)

    def clone(self):
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        return other

    @torch.no_grad()
    def encode(self, text, vector=None):
        """A prompt's text states; a vector takes the place of the second token."""
        self.patcher.load()
        states = []
        for name, encoder in self.cond_stage_model.items():
            tokenizer = getattr(self.tokenizer, name).tokenizer
            row = tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
            states.append(encoder([row if vector is None else [row[0], vector, *row[2:]]]))
        return torch.cat(states, -1)
