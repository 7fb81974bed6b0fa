"""Lines of Swift that load what was written."""


def loading(file: str) -> str:
    """Load a Core ML package on the Neural Engine."""
    return f"""\
import CoreML

let settings = MLModelConfiguration()
settings.computeUnits = .cpuAndNeuralEngine
let compiled = try await MLModel.compileModel(at: URL(filePath: "{file}"))
let encoder = try await MLModel.load(contentsOf: compiled, configuration: settings)
"""
