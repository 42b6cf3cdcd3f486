// Rows side by side in panels (decode_layers.h): how rows are cut into them, and memory for channels of all rows.
#pragma once

#include "tile.h"

#include <vector>

namespace r1fast {
namespace {

constexpr int64_t kPanel = 32;

struct Panel {
  int64_t first, width;  // rows
};

struct Layout {
  int64_t rows = 0, lanes = 0;
  std::vector<Panel> panels;

  void set(int64_t num_rows) {
    rows = num_rows;
    lanes = 0;
    panels.clear();
    while (lanes < rows) {
      panels.push_back({lanes, rows - lanes > kPanel / 2 ? kPanel : kPanel / 2});
      lanes += panels.back().width;
    }
  }
};

// Channels of all rows of a layout, panel after panel.
template <typename Unit>
struct Sheet {
  Unit* data = nullptr;
  int64_t channels = 0;  // units of a row, padded

  Unit* at(const Panel& panel, int64_t channel = 0) const {
    return data + panel.first * channels + channel * panel.width;
  }
};

template <typename Unit>
class SheetMemory {
 public:
  // A strip more than asked for: products write whole strips. And a block behind the last panel, which transposes read.
  Sheet<Unit> get(const Layout& layout, int64_t channels) {
    const int64_t size = padded(channels + kStrip);
    return {memory_.get(layout.lanes * size + kBlock * kPanel), size};
  }

 private:
  Scratch<Unit> memory_;
};

}  // namespace
}  // namespace r1fast
