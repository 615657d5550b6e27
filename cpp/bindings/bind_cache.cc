// KvGroup, Lease, CacheManager.
#include "bindings/bindings.h"
#include "cache/cache_manager.h"

namespace sapwood::bindings {
namespace {

KvKind ParseKind(const std::string& kind) {
  if (kind == "full") return KvKind::kFull;
  if (kind == "window") return KvKind::kWindow;
  if (kind == "latent") return KvKind::kLatent;
  throw InvalidArgument(StrCat("KvGroup kind must be full, window or latent, got \"", kind, "\""));
}

const char* KindName(KvKind kind) {
  switch (kind) {
    case KvKind::kFull: return "full";
    case KvKind::kWindow: return "window";
    case KvKind::kLatent: return "latent";
    case KvKind::kState: return "state";
  }
  return "?";
}

CacheKind ParseCacheKind(const std::string& kind) {
  if (kind == "radix") return CacheKind::kRadix;
  if (kind == "flat") return CacheKind::kFlat;
  if (kind == "none") return CacheKind::kNone;
  throw InvalidArgument(StrCat("cache kind must be radix, flat or none, got \"", kind, "\""));
}

py::bytes HashBytes(const PageHash& hash) {
  return py::bytes(reinterpret_cast<const char*>(&hash), sizeof hash);
}

// A lease must not outlive its manager: keep_alive below ties the two.
struct PyLease {
  Lease lease;
};

Lease& Live(PyLease& lease) {
  SAPWOOD_REQUIRE(static_cast<bool>(lease.lease), "lease was already released");
  return lease.lease;
}

}  // namespace

void BindCache(py::module_& m) {
  py::class_<KvGroup>(m, "KvGroup")
      .def(py::init([](const std::string& kind, int32_t window, int32_t num_layers, int32_t page_size,
                       int64_t page_bytes) {
             return KvGroup{ParseKind(kind), window, num_layers, page_size, page_bytes};
           }),
           py::arg("kind") = "full", py::kw_only(), py::arg("window") = 0, py::arg("num_layers") = 1,
           py::arg("page_size") = 16, py::arg("page_bytes") = 0)
      .def_property_readonly("kind", [](const KvGroup& g) { return KindName(g.kind); })
      .def_readonly("window", &KvGroup::window)
      .def_readonly("num_layers", &KvGroup::num_layers)
      .def_readonly("page_size", &KvGroup::page_size)
      .def_readonly("page_bytes", &KvGroup::page_bytes);

  py::class_<PoolStats>(m, "PoolStats")
      .def_readonly("total", &PoolStats::total)
      .def_readonly("free", &PoolStats::free)
      .def_readonly("cached", &PoolStats::cached)
      .def_readonly("leased", &PoolStats::leased)
      .def_readonly("limbo", &PoolStats::limbo)
      .def_readonly("evictable", &PoolStats::evictable);

  py::class_<PyLease>(m, "Lease")
      .def_property_readonly("cached_len", [](PyLease& l) { return Live(l).cached_len(); })
      .def_property_readonly("capacity", [](PyLease& l) { return Live(l).capacity(); })
      .def_property_readonly("valid", [](PyLease& l) { return Live(l).valid(); })
      .def("pages", [](PyLease& l, int group) { return Copy<int32_t>(Live(l).pages(group)); })
      .def("first_page", [](PyLease& l, int group) { return Live(l).first_page(group); });

  py::class_<CacheManager>(m, "CacheManager")
      .def(py::init([](std::vector<KvGroup> groups, std::vector<int32_t> num_pages, const std::string& kind,
                       bool record_events) {
             return std::make_unique<CacheManager>(
                 CacheConfig{std::move(groups), std::move(num_pages), ParseCacheKind(kind), record_events});
           }),
           py::arg("groups"), py::arg("num_pages"), py::kw_only(), py::arg("kind") = "radix",
           py::arg("record_events") = false)
      .def_property_readonly("page_size", &CacheManager::page_size)
      .def_property_readonly("num_groups", &CacheManager::num_groups)
      .def_property_readonly("num_tree_nodes", &CacheManager::num_tree_nodes)
      .def("match", [](const CacheManager& c, uint64_t ns, const Ints& keys) { return c.Match(ns, View(keys)); })
      .def("match_many",
           [](const CacheManager& c, const std::vector<uint64_t>& ns, const std::vector<Ints>& keys) {
             SAPWOOD_REQUIRE(ns.size() == keys.size(), "match_many: ", ns.size(), " namespaces for ", keys.size(),
                             " key arrays");
             std::vector<int64_t> out(keys.size());
             for (size_t i = 0; i < keys.size(); ++i) out[i] = c.Match(ns[i], View(keys[i]));
             return out;
           })
      .def(
          "acquire",
          [](CacheManager& c, uint64_t ns, const Ints& keys, int64_t max_len) {
            return PyLease{c.Acquire(ns, View(keys), max_len)};
          },
          py::keep_alive<0, 1>())
      .def("reserve", [](CacheManager& c, PyLease& l, int64_t n) { return c.Reserve(Live(l), n); })
      .def("commit", [](CacheManager& c, PyLease& l, const Ints& keys,
                        int64_t ready_step) { c.Commit(Live(l), View(keys), ready_step); })
      .def(
          "fork",
          [](py::object self, PyLease& l, const Ints& keys, int64_t at, int64_t last_step) {
            CacheManager& c = self.cast<CacheManager&>();
            std::vector<PageCopy> copies;
            Lease child = c.Fork(Live(l), View(keys), at, last_step, &copies);
            std::vector<std::tuple<int32_t, PageId, PageId>> out;
            for (const PageCopy& copy : copies) out.emplace_back(copy.group, copy.src, copy.dst);
            py::object lease = py::none();
            if (child) {
              lease = py::cast(PyLease{std::move(child)});
              py::detail::keep_alive_impl(lease, self);
            }
            return py::make_tuple(lease, out);
          },
          py::arg("lease"), py::arg("keys"), py::arg("at"), py::arg("last_step"))
      .def(
          "truncate",
          [](CacheManager& c, PyLease& l, int64_t n, int64_t last_step) { c.Truncate(Live(l), n, last_step); },
          py::arg("lease"), py::arg("num_tokens"), py::arg("last_step") = kNoStep)
      .def(
          "slide_window",
          [](CacheManager& c, PyLease& l, int64_t kv_len, int64_t last_step) {
            c.SlideWindow(Live(l), kv_len, last_step);
          },
          py::arg("lease"), py::arg("kv_len"), py::arg("last_step") = kNoStep)
      .def(
          "release",
          [](CacheManager& c, PyLease& l, int64_t last_step) { c.Release(std::move(Live(l)), last_step); },
          py::arg("lease"), py::arg("last_step") = kNoStep)
      .def(
          "invalidate",
          [](CacheManager& c, PyLease& l, int64_t last_step) { c.Invalidate(std::move(Live(l)), last_step); },
          py::arg("lease"), py::arg("last_step") = kNoStep)
      .def("retire", &CacheManager::Retire)
      .def("flush", &CacheManager::Flush)
      .def("stats", &CacheManager::stats, py::arg("group") = 0)
      .def("available_pages", &CacheManager::AvailablePages)
      .def("take_events",
           [](CacheManager& c) {
             py::list out;
             for (const CacheEvent& e : c.TakeEvents()) {
               out.append(py::make_tuple(e.kind == CacheEvent::Kind::kStored ? "stored" : "removed", e.group,
                                         HashBytes(e.hash), HashBytes(e.parent), e.first_token));
             }
             return out;
           })
      .def("hash_pages",
           [](const CacheManager& c, uint64_t ns, const Ints& keys) {
             py::list out;
             for (const PageHash& hash : c.HashPages(ns, View(keys))) out.append(HashBytes(hash));
             return out;
           })
      .def("check_invariants", &CacheManager::CheckInvariants)
      .def("debug_string", &CacheManager::DebugString)
      .def("test_fail_allocation", &CacheManager::TEST_FailAllocation);
}

}  // namespace sapwood::bindings
