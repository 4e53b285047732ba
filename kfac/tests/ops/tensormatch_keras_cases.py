"""A table of Keras' layers and of the blocks that their parameters get by scanning."""

from keras import layers

from kfac.tests.ops.tensormatch_keras_case import (
    CONV,
    DENSE,
    DEPTHWISE,
    GENERIC,
    SCALE,
    SHARED,
    SHARED_CONV,
    Case,
)


def einsum(equation, output_shape, bias_axes=None):
    return lambda: layers.EinsumDense(
        equation, output_shape=output_shape, bias_axes=bias_axes
    )


def with_lora(layer, input_shape):
    layer.build(input_shape)
    layer.enable_lora(2)
    return layer


ATTENTION = {
    f"{role}/kernel,{role}/bias": SHARED
    for role in ("query", "key", "value", "attention_output")
}

CASES = [
    Case("Dense", lambda: layers.Dense(3), (4,), {"kernel,bias": DENSE}),
    Case(
        "Dense without bias",
        lambda: layers.Dense(3, use_bias=False),
        (4,),
        {"kernel": DENSE},
    ),
    Case(
        "Dense on sequences", lambda: layers.Dense(3), (5, 4), {"kernel,bias": SHARED}
    ),
    Case(
        "Dense, sequences, without bias",
        lambda: layers.Dense(3, use_bias=False),
        (5, 4),
        {"kernel": SHARED},
    ),
    Case(
        "Dense on images", lambda: layers.Dense(3), (2, 5, 4), {"kernel,bias": SHARED}
    ),
    Case(
        "Dense, sequences of length one",
        lambda: layers.Dense(3),
        (1, 4),
        {"kernel,bias": DENSE},
    ),
    Case(
        "Dense with LoRA",
        lambda: with_lora(layers.Dense(3), (None, 4)),
        (4,),
        {"lora_kernel_b,bias": DENSE, "lora_kernel_a": GENERIC},
        "low-rank update",
    ),
    Case(
        "EinsumDense ab,bc->ac",
        einsum("ab,bc->ac", 7, "c"),
        (4,),
        {"kernel,bias": DENSE},
    ),
    Case(
        "EinsumDense abc,cd->abd",
        einsum("abc,cd->abd", (None, 7), "d"),
        (5, 4),
        {"kernel,bias": SHARED},
    ),
    Case(
        "EinsumDense into heads",
        einsum("abc,cde->abde", (None, 2, 3), "de"),
        (5, 4),
        {"kernel,bias": SHARED},
    ),
    Case(
        "EinsumDense into heads, used once",
        einsum("ac,cde->ade", (2, 3), "de"),
        (4,),
        {"kernel,bias": SHARED},
    ),
    Case(
        "EinsumDense on images",
        einsum("abcd,de->abce", (None, 2, 3), "e"),
        (5, 2, 4),
        {"kernel,bias": SHARED},
    ),
    Case(
        "EinsumDense from heads",
        einsum("abcd,cde->abe", (None, 7), "e"),
        (5, 2, 4),
        {"kernel,bias": SHARED},
    ),
    Case(
        "EinsumDense with a bias per position",
        einsum("abc,cd->abd", (5, 7), "bd"),
        (5, 4),
        {"kernel": SHARED, "bias": GENERIC},
        "not to the output of a recognised layer",
    ),
    Case(
        "EinsumDense with a bias per feature of each head",
        einsum("abc,cde->abde", (None, 2, 3), "e"),
        (5, 4),
        {"kernel": SHARED, "bias": GENERIC},
        "not to the output of a recognised layer",
    ),
    Case(
        "EinsumDense with weights per position",
        einsum("abc,bcd->abd", (5, 7)),
        (5, 4),
        {"kernel": GENERIC},
        "abc,bcd->abd",
    ),
    Case(
        "EinsumDense with LoRA",
        lambda: with_lora(einsum("abc,cd->abd", (None, 7), "d")(), (None, 5, 4)),
        (5, 4),
        {"lora_kernel_b,bias": SHARED, "lora_kernel_a": GENERIC},
        "low-rank update",
    ),
    Case(
        "MultiHeadAttention",
        lambda: layers.MultiHeadAttention(2, 3),
        (5, 4),
        ATTENTION,
        inputs=2,
    ),
    Case(
        "GroupQueryAttention",
        lambda: layers.GroupQueryAttention(3, 4, 2),
        (5, 4),
        ATTENTION,
        inputs=2,
    ),
    Case("Conv1D", lambda: layers.Conv1D(3, 3), (8, 2), {"kernel,bias": CONV}),
    Case(
        "Conv1D with strides and padding, without bias",
        lambda: layers.Conv1D(3, 3, strides=2, padding="same", use_bias=False),
        (8, 2),
        {"kernel": CONV},
    ),
    Case(
        "Conv1D, causal and dilated",
        lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2),
        (8, 2),
        {"kernel,bias": CONV},
    ),
    Case("Conv2D", lambda: layers.Conv2D(3, 3), (6, 6, 2), {"kernel,bias": CONV}),
    Case(
        "Conv2D with strides and padding, without bias",
        lambda: layers.Conv2D(3, 3, strides=2, padding="same", use_bias=False),
        (6, 6, 2),
        {"kernel": CONV},
    ),
    *[
        Case(
            f"Conv2D, dilated, padding {padding}",
            lambda p=padding: layers.Conv2D(3, 2, dilation_rate=2, padding=p),
            (6, 6, 2),
            {"kernel,bias": CONV},
        )
        for padding in ("valid", "same")
    ],
    Case(
        "Conv2D with groups",
        lambda: layers.Conv2D(4, 3, groups=2),
        (6, 6, 2),
        {"kernel": GENERIC, "bias": GENERIC},
        "nested function call",
    ),
    Case("Conv3D", lambda: layers.Conv3D(3, 2), (3, 3, 3, 2), {"kernel,bias": CONV}),
    Case(
        "Conv3D, dilated",
        lambda: layers.Conv3D(3, 2, dilation_rate=2),
        (4, 4, 4, 2),
        {"kernel,bias": CONV},
    ),
    *[
        Case(
            layer.__name__,
            lambda layer=layer: layer(3, 2, strides=2),
            shape,
            {"kernel": GENERIC, "bias": GENERIC},
            "transposed convolution",
        )
        for layer, shape in [
            (layers.Conv1DTranspose, (4, 2)),
            (layers.Conv2DTranspose, (4, 4, 2)),
            (layers.Conv3DTranspose, (2, 2, 2, 2)),
        ]
    ],
    Case(
        "DepthwiseConv1D",
        lambda: layers.DepthwiseConv1D(3),
        (8, 2),
        {"kernel": GENERIC, "bias": GENERIC},
        "depthwise convolution",
    ),
    Case(
        "DepthwiseConv2D",
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (6, 6, 2),
        {"kernel": DEPTHWISE, "bias": GENERIC},
        "not to the output of a recognised layer",
    ),
    Case(
        "DepthwiseConv2D, dilated, without bias",
        lambda: layers.DepthwiseConv2D(
            3, dilation_rate=2, padding="same", use_bias=False
        ),
        (6, 6, 2),
        {"kernel": DEPTHWISE},
    ),
    Case(
        "SeparableConv1D",
        lambda: layers.SeparableConv1D(5, 3),
        (8, 2),
        {"depthwise_kernel": GENERIC, "pointwise_kernel,bias": CONV},
        "depthwise convolution",
    ),
    Case(
        "SeparableConv2D",
        lambda: layers.SeparableConv2D(5, 3),
        (6, 6, 2),
        {"depthwise_kernel": DEPTHWISE, "pointwise_kernel,bias": CONV},
    ),
    Case(
        "BatchNormalization",
        layers.BatchNormalization,
        (4,),
        {"gamma,beta": SCALE},
        training=True,
    ),
    Case(
        "BatchNormalization in inference",
        layers.BatchNormalization,
        (4, 4, 3),
        {"gamma,beta": SCALE},
        training=False,
    ),
    *[
        Case(
            f"BatchNormalization {variant}",
            lambda options=options: layers.BatchNormalization(**options),
            (4, 4, 3),
            expected,
            why,
            training=True,
        )
        for variant, options, expected, why in [
            (
                "on the first axis",
                {"axis": 1},
                {"gamma": GENERIC, "beta": GENERIC},
                "last axes",
            ),
            ("without center", {"center": False}, {"gamma": SCALE}, None),
            ("without scale", {"scale": False}, {"beta": GENERIC}, "without scale"),
        ]
    ],
    Case(
        "LayerNormalization",
        layers.LayerNormalization,
        (5, 4),
        {"gamma,beta": SCALE},
    ),
    *[
        Case(
            f"LayerNormalization {variant}",
            lambda options=options: layers.LayerNormalization(**options),
            (5, 4),
            {names: SCALE},
        )
        for variant, options, names in [
            ("over two axes", {"axis": (1, 2)}, "gamma,beta"),
            ("without center", {"center": False}, "gamma"),
        ]
    ],
    Case(
        "LayerNormalization without scale",
        lambda: layers.LayerNormalization(scale=False),
        (5, 4),
        {"beta": GENERIC},
        "without scale",
    ),
    Case(
        "LayerNormalization over the first axis",
        lambda: layers.LayerNormalization(axis=1),
        (5, 4),
        {"gamma": GENERIC, "beta": GENERIC},
        "last axes",
    ),
    *[
        Case(name, lambda: layers.GroupNormalization(2), shape, {"gamma,beta": SCALE})
        for name, shape in [
            ("GroupNormalization", (5, 4)),
            ("GroupNormalization on images", (3, 3, 4)),
        ]
    ],
    Case(
        "GroupNormalization of the first axis",
        lambda: layers.GroupNormalization(2, axis=1),
        (4, 3, 3),
        {"gamma": GENERIC, "beta": GENERIC},
        "last axes",
    ),
    Case(
        "RMSNormalization",
        lambda: layers.RMSNormalization(),
        (5, 4),
        {"scale": SCALE},
        newer="RMSNormalization",
    ),
    Case(
        "Embedding of sequences",
        lambda: layers.Embedding(10, 4),
        (5,),
        {"embeddings": SHARED},
        ids=10,
    ),
    Case(
        "Embedding of words of letters",
        lambda: layers.Embedding(10, 4),
        (5, 2),
        {"embeddings": SHARED},
        ids=10,
    ),
    Case(
        "Embedding of one id",
        lambda: layers.Embedding(10, 4),
        (),
        {"embeddings": DENSE},
        ids=10,
    ),
    Case(
        "Embedding with LoRA",
        lambda: with_lora(layers.Embedding(10, 4), (None,)),
        (5,),
        {"lora_embeddings_a": GENERIC, "lora_embeddings_b": GENERIC},
        ids=10,
    ),
    Case(
        "ReversibleEmbedding",
        lambda: layers.ReversibleEmbedding(10, 4),
        (5,),
        {"embeddings": SHARED},
        ids=10,
        newer="ReversibleEmbedding",
    ),
    Case(
        "SimpleRNN, unrolled",
        lambda: layers.SimpleRNN(3, unroll=True),
        (2, 4),
        {"cell/kernel,cell/bias": SHARED, "recurrent_kernel": SHARED},
    ),
    Case(
        "LSTM, unrolled",
        lambda: layers.LSTM(3, unroll=True),
        (3, 4),
        {"cell/kernel,cell/bias": SHARED, "recurrent_kernel": SHARED},
    ),
    Case(
        "GRU, unrolled",
        lambda: layers.GRU(3, unroll=True),
        (3, 4),
        {"cell/kernel": SHARED, "recurrent_kernel": SHARED, "bias": GENERIC},
        "Split",
    ),
    Case(
        "GRU with reset before, unrolled",
        lambda: layers.GRU(3, unroll=True, reset_after=False),
        (3, 4),
        {"cell/kernel,cell/bias": SHARED, "recurrent_kernel": GENERIC},
        "StridedSlice",
    ),
    Case(
        "Bidirectional, unrolled",
        lambda: layers.Bidirectional(layers.SimpleRNN(3, unroll=True)),
        (2, 4),
        {
            "forward.*cell/kernel,forward.*bias": SHARED,
            "forward.*recurrent_kernel": SHARED,
            "backward.*cell/kernel,backward.*bias": SHARED,
            "backward.*recurrent_kernel": SHARED,
        },
    ),
    Case(
        "LSTM, rolled",
        lambda: layers.LSTM(3),
        (3, 4),
        {"cell/kernel": GENERIC, "recurrent_kernel": GENERIC, "bias": GENERIC},
        "unroll=True",
    ),
    Case(
        "TimeDistributed",
        lambda: layers.TimeDistributed(layers.Dense(3)),
        (2, 4),
        {"kernel,bias": SHARED},
    ),
    Case(
        "TimeDistributed convolution",
        lambda: layers.TimeDistributed(layers.Conv2D(3, 2)),
        (2, 4, 4, 2),
        {"kernel,bias": SHARED_CONV},
    ),
    Case(
        "ConvLSTM2D, unrolled",
        lambda: layers.ConvLSTM2D(3, 2, unroll=True),
        (2, 4, 4, 2),
        {"cell/kernel": GENERIC, "recurrent_kernel": GENERIC, "bias": GENERIC},
        "Split",
    ),
    Case("PReLU", layers.PReLU, (5, 4), {"alpha": GENERIC}, "Neg"),
    Case(
        "SpectralNormalization",
        lambda: layers.SpectralNormalization(layers.Dense(3)),
        (4,),
        {"kernel,bias": DENSE},
        training=True,
    ),
]
