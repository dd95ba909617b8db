// A segmentation network without Python: mask NET.pte IMAGE MASK.png [THREADS [RUNS]]
//
// NET.pte comes from `bidensify export RUN net.pte`. MASK.png gets the class of every pixel, 0 to 255 (of one channel, 1 where it is above 0); what was found is printed,
// and the median time of RUNS runs.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "runner.h"  // bidensify_check, bidensify_threads

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;

// The size that the program takes: its input's, or the largest of it.
static bool input_size(Module& net, int size[3]) {
  const auto meta = net.method_meta("forward");
  if (!meta.ok() || meta->num_inputs() != 1) return false;
  const auto info = meta->input_tensor_meta(0);
  if (!info.ok() || info->sizes().size() != 4 || info->scalar_type() != ScalarType::Float) return false;
  for (int i = 0; i < 3; ++i) size[i] = info->sizes()[i + 1];
  return info->sizes()[0] >= 1 && size[0] == 3;
}

// Three numbers that `bidensify export` wrote beside the network, or what networks of ImageNet take.
static void three(Module& net, const char* name, float values[3]) {
  const auto names = net.method_names();
  if (!names.ok() || !names->count(name)) return;
  const auto result = net.execute(name);
  if (result.ok() && result->size() >= 3)
    for (size_t i = 0; i < 3; ++i) values[i] = (float)(*result)[i].toDouble();
}

// Bilinear, from RGB bytes to a normalised (3, height, width).
static std::vector<float> prepare(const unsigned char* rgb, int w, int h, int width, int height, const float mean[3],
                                  const float std[3]) {
  std::vector<float> out((size_t)3 * height * width);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) {
      const float fy = std::min(std::max((y + 0.5f) * h / height - 0.5f, 0.0f), h - 1.0f);
      const float fx = std::min(std::max((x + 0.5f) * w / width - 0.5f, 0.0f), w - 1.0f);
      const int y0 = (int)fy, x0 = (int)fx, y1 = std::min(y0 + 1, h - 1), x1 = std::min(x0 + 1, w - 1);
      for (int c = 0; c < 3; ++c) {
        const auto at = [&](int row, int column) { return (float)rgb[((size_t)row * w + column) * 3 + c]; };
        const float top = at(y0, x0) + (at(y0, x1) - at(y0, x0)) * (fx - x0);
        const float below = at(y1, x0) + (at(y1, x1) - at(y1, x0)) * (fx - x0);
        out[((size_t)c * height + y) * width + x] = ((top + (below - top) * (fy - y0)) / 255 - mean[c]) / std[c];
      }
    }
  return out;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc > 6) return std::fprintf(stderr, "usage: mask NET.pte IMAGE MASK.png [THREADS [RUNS]]\n"), 2;
  // Before anything is loaded: what is loaded keeps the threads that were there.
  const int threads = bidensify_threads(argc > 4 ? std::atoi(argv[4]) : 0);
  char why[1000];
  if (bidensify_check(argv[1], why, sizeof why) != 0) return std::fprintf(stderr, "%s\n", why), 1;
  Module net(argv[1], Module::LoadMode::Mmap);
  // Reads the file's parts and checks that they lie inside it.
  Error error = net.load(executorch::runtime::Program::Verification::InternalConsistency);
  if (error == Error::Ok) error = net.load_forward();
  if (error != Error::Ok)
    return std::fprintf(stderr, "%s: no program that this runtime runs (%s)\n", argv[1], executorch::runtime::to_string(error)), 1;
  int size[3];
  if (!input_size(net, size)) return std::fprintf(stderr, "%s: its input is not one image (1, 3, H, W)\n", argv[1]), 1;
  int w, h, channels;
  unsigned char* rgb = stbi_load(argv[2], &w, &h, &channels, 3);
  if (rgb == nullptr) return std::fprintf(stderr, "%s: %s\n", argv[2], stbi_failure_reason()), 1;

  float mean[3] = {0.485f, 0.456f, 0.406f}, std[3] = {0.229f, 0.224f, 0.225f};
  three(net, "image_mean", mean);
  three(net, "image_std", std);
  const int height = size[1], width = size[2];
  std::vector<float> image = prepare(rgb, w, h, width, height, mean, std);
  stbi_image_free(rgb);
  auto input = from_blob(image.data(), {1, 3, height, width});

  const auto result = net.forward(input);
  std::vector<double> times;
  for (int i = 0; result.ok() && i < (argc > 5 ? std::max(std::atoi(argv[5]), 1) : 1); ++i) {
    const auto start = std::chrono::steady_clock::now();
    if (!net.forward(input).ok()) break;
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  // The log above says which layer refused what.
  if (!result.ok() || result->empty() || !(*result)[0].isTensor())
    return std::fprintf(stderr, "%s does not run: %s\n", argv[1], executorch::runtime::to_string(result.error())), 1;
  const auto scores = (*result)[0].toTensor();
  if (scores.dim() != 4 || scores.scalar_type() != ScalarType::Float || scores.size(1) < 1 || scores.size(1) > 256)
    return std::fprintf(stderr, "%s: its output is no (1, classes, H, W) of float32 with at most 256 classes\n", argv[1]), 1;

  const int classes = (int)scores.size(1), rows = (int)scores.size(2), columns = (int)scores.size(3);
  const auto* value = scores.const_data_ptr<float>();
  const auto step = scores.strides();
  std::vector<unsigned char> mask((size_t)rows * columns);
  std::map<int, int> found;
  for (int y = 0; y < rows; ++y)
    for (int x = 0; x < columns; ++x) {
      const float* pixel = value + (size_t)y * step[2] + (size_t)x * step[3];
      // One channel is a score for or against.
      int best = classes == 1 && *pixel > 0;
      for (int c = 1; c < classes; ++c)
        if (pixel[(size_t)c * step[1]] > pixel[(size_t)best * step[1]]) best = c;
      mask[(size_t)y * columns + x] = (unsigned char)best;
      ++found[best];
    }
  if (!stbi_write_png(argv[3], columns, rows, 1, mask.data(), columns)) return std::fprintf(stderr, "cannot write %s\n", argv[3]), 1;
  std::sort(times.begin(), times.end());
  const double ms = times.empty() ? 0 : times[times.size() / 2];
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  std::printf("%s: %dx%d, %.1f ms on %d threads, %.1f MiB at its peak\n", argv[3], columns, rows, ms, threads,
              usage.ru_maxrss / 1024.0);
  if (times.size() > 1) std::printf("the fastest of %zu runs: %.1f ms\n", times.size(), times[0]);
  for (const auto& [index, count] : found) std::printf("class %3d: %5.1f %%\n", index, 100.0 * count / mask.size());
  return 0;
}
