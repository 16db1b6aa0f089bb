#include <cstring>

#include "cuda/primitives.h"

namespace pyrobust {
namespace cuda {
namespace {

using fibres::Product;
using fibres::Products;
using fibres::Registers;

// The 16 bytes of which this lane reads four: chunk `i` of row lane / 4 of rows 8 m .. 8 m + 7.
const uint8_t* chunk_of(uint64_t b, int m, int i) {
  const int lane = fibres::lane_index();
  uintptr_t at = (static_cast<uintptr_t>(b) << 4) + static_cast<uintptr_t>(i) * 16 +
                 static_cast<uintptr_t>(8 * m + lane / 4) * 128;
  at ^= (at >> 7 & 7) << 4;
  const auto* chunk = reinterpret_cast<const uint8_t*>(at);
  fibres::check_shared(chunk, 16, "a product of a warpgroup");
  fibres::check_shown(chunk, 16, "a product of a warpgroup");
  return chunk;
}

void make(const Product& product) {
  if (std::memcmp(product.a, product.issued.data(), sizeof(product.issued)) != 0) {
    fibres::fault("registers of a product were written while it was under way");
  }
  uint32_t a[4];
  std::memcpy(a, product.a, sizeof(a));
  for (int m = 0; m < product.eights; ++m) {
    auto& sums = *reinterpret_cast<float (*)[4]>(product.sums + 4 * m);
    uint32_t words[2];
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&words[i], chunk_of(product.b, m, i) + fibres::lane_index() % 4 * 4, 4);
    }
    for (float& sum : sums) sum = product.onto ? sum : 0.0f;
    product.multiply(sums, a, words);
  }
}

// Registers that change between the fence and a product which uses them again.
void check_registers(Products& products, const uint32_t* a, const Registers& now) {
  if (!products.fenced) fibres::fault("a product whose registers no fence has shown to it");
  for (const auto& seen : products.since_fence) {
    if (seen.first == a && seen.second != now) {
      fibres::fault("registers of a product were written after the fence");
    }
  }
  products.since_fence.emplace_back(a, now);
}

void check_finished(const Product& product, const float* sums, int eights) {
  if (product.sums < sums + 4 * eights && sums < product.sums + 4 * product.eights) {
    fibres::fault("sums are read that a product under way adds to");
  }
}

}  // namespace

void start_product(float* sums, int eights, const uint32_t (&a)[4], uint64_t b, bool onto,
                   fibres::Multiply multiply) {
  Products& products = fibres::products();
  const Registers now = {a[0], a[1], a[2], a[3]};
  check_registers(products, a, now);
  const Product product = {sums, a, now, b, eights, onto, multiply};
  if (fibres::options().copies_land_at_once) {
    make(product);
    return;
  }
  for (int i = 0; i < 2 * eights; ++i) chunk_of(b, i / 2, i % 2);
  products.open.push_back(product);
}

void begin_products() {
  Products& products = fibres::products();
  products.fenced = true;
  products.since_fence.clear();
}

void commit_products() {
  Products& products = fibres::products();
  products.committed.push_back(std::move(products.open));
  products.open.clear();
}

void finish_products(int left, const float* sums, int eights) {
  Products& products = fibres::products();
  while (static_cast<int>(products.committed.size()) > left) {
    for (const Product& product : products.committed.front()) make(product);
    products.committed.pop_front();
  }
  for (const auto& group : products.committed) {
    for (const Product& product : group) check_finished(product, sums, eights);
  }
  for (const Product& product : products.open) check_finished(product, sums, eights);
  products.fenced = false;
}

}  // namespace cuda
}  // namespace pyrobust
