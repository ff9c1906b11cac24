"""ATen operations by what they do with values: moved, looked up, multiplied, summed; names without a final underscore."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# values are moved or copied, none is changed; a dropped value is a zero
MOVED = _names(
    "clone copy _to_copy detach alias lift_fresh contiguous repeat cat stack flip roll tril triu constant_pad_nd "
    "masked_fill index_put _index_put_impl scatter slice_scatter select_scatter masked_scatter index_copy "
    "diagonal_scatter reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d sort topk _unsafe_view "
    "_reshape_alias repeat_interleave native_dropout index_fill unsafe_split split_with_sizes_copy pixel_shuffle "
    "pixel_unshuffle channel_shuffle im2col diag_embed as_strided_scatter "
    "block_diag view_copy permute_copy slice_copy nan_to_num"
)
# values between the given ones, of the same channels
RESAMPLED = _names(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
LOOKED_UP = _names("embedding index index_select gather take _unsafe_index _embedding_bag")
SUMS = _names("sum mean nansum cumsum")
# values are reduced to a few numbers that say something of them
STATISTICS = _names(
    "amax amin max min prod std var var_mean std_mean norm linalg_vector_norm logsumexp median argmax argmin any all "
    "aminmax cumprod logcumsumexp count_nonzero mode kthvalue isfinite equal _local_scalar_dense trace dist mse_loss"
)
PRODUCTS = _names("mm bmm mv dot vdot addmm baddbmm addmv addbmm linear _grouped_mm matmul")
CONVOLUTIONS = _names("convolution")
ADDED = _names("add sub rsub")
MULTIPLIED = _names("mul div")
# each value goes to its own place, as a function of it
FUNCTIONS = _names(
    "abs acos acosh asin asinh atan atanh cos cosh sin sinh tan tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt "
    "reciprocal neg square sigmoid log_sigmoid_forward relu gelu silu elu celu selu softplus hardtanh hardsigmoid "
    "hardswish leaky_relu mish erf erfc clamp clamp_min clamp_max round floor ceil trunc pow rsub softmax _softmax "
    "_log_softmax log_softmax _safe_softmax threshold softshrink hardshrink logit sinc sgn rrelu_with_noise remainder "
    "fmod bitwise_and bitwise_or relu6 positive frac lgamma digamma erfinv special_expit"
)
# of two values one is taken
CHOSEN = _names("where maximum minimum fmax fmin")
COMPARED = _names("eq ne lt le gt ge logical_and logical_or logical_not isnan isinf signbit sign bitwise_not")
# values are added at places that an index names
ACCUMULATED = _names("index_add scatter_add index_reduce scatter_reduce")
# read the extents of a tensor or nothing, never its values
SHAPES = _names(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full "
    "empty_strided new_empty_strided sym_size sym_stride bernoulli random normal uniform exponential fill zero "
    "geometric resize set is_same_size"
)
# norms: the positions of their gain and shift
NORMS: dict[str, tuple[int, int]] = {
    "native_layer_norm": (2, 3),
    "native_batch_norm": (1, 2),
    "native_group_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_functional": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
    "_batch_norm_with_update": (1, 2),
    "_batch_norm_with_update_functional": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "_fused_rms_norm": (2, -1),
}
