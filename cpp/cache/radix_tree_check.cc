// RadixTree::Check: every count and link of the tree, rebuilt from scratch. Tests call it after every operation.

#include <set>

#include "base/check.h"
#include "cache/page_hash.h"
#include "cache/radix_tree.h"

namespace sapwood {

void RadixTree::CheckNode(const TreeNode& node, std::vector<std::vector<bool>>* seen) const {
  const auto num_pages = static_cast<size_t>(node.num_pages);
  SAPWOOD_CHECK(static_cast<int>(node.groups.size()) == num_groups_, "node ", node.id, ": groups");
  SAPWOOD_CHECK(node.keys.size() == num_pages * static_cast<size_t>(page_size_), "node ", node.id, ": keys");
  if (node.parent == nullptr) {
    SAPWOOD_CHECK(num_pages == 0 && node.begin == 0, "node ", node.id, ": a root holds pages");
    const auto root = roots_.find(node.ns);
    SAPWOOD_CHECK(root != roots_.end() && root->second == &node, "node ", node.id, ": a root nobody knows");
    return;
  }
  SAPWOOD_CHECK(num_pages > 0, "node ", node.id, " is empty");
  SAPWOOD_CHECK(node.parent->live && node.begin == node.parent->end() && node.ns == node.parent->ns, "node ", node.id,
                ": its parent's end is not its begin");
  SAPWOOD_CHECK(node.parent->attached || !node.attached, "node ", node.id, " hangs below an invalidated one");
  SAPWOOD_CHECK(node.attached || node.pins > 0, "node ", node.id, " is invalidated and unpinned");

  for (int g = 0; g < num_groups_; ++g) {
    const TreeNode::Group& group = node.groups[static_cast<size_t>(g)];
    SAPWOOD_CHECK(group.pages.size() == num_pages, "node ", node.id, ": pages of group ", g);
    SAPWOOD_CHECK(group.first_valid >= 0 && group.first_valid <= node.num_pages, "node ", node.id, ": first_valid");
    SAPWOOD_CHECK(is_window(g) || group.first_valid == 0 || (!node.attached && group.locks == 0), "node ", node.id,
                  ": group ", g, " has lost pages");
    for (size_t i = 0; i < num_pages; ++i) {
      const PageId page = group.pages[i];
      SAPWOOD_CHECK((page == kNoPage) == (static_cast<int32_t>(i) < group.first_valid), "node ", node.id, ": page ", i,
                    " against first_valid ", group.first_valid);
      if (page == kNoPage) continue;
      const PageState expected = node.attached ? PageState::kCached : PageState::kLimbo;
      const PagePool& pages = (*pools_)[static_cast<size_t>(g)];
      SAPWOOD_CHECK(pages.state(page) == expected, "node ", node.id, ": page ", page, " is in state ",
                    static_cast<int>(pages.state(page)));
      SAPWOOD_CHECK(!(*seen)[static_cast<size_t>(g)][static_cast<size_t>(page)], "page ", page, " is held twice");
      (*seen)[static_cast<size_t>(g)][static_cast<size_t>(page)] = true;
    }
  }
  if (flat_ || record_events_) {
    SAPWOOD_CHECK(node.hashes.size() == num_pages, "node ", node.id, ": hashes");
    PageHash previous = ChainHash(node.parent);
    for (size_t i = 0; i < num_pages; ++i) {
      previous = NextHash(previous, node.keys.data() + i * static_cast<size_t>(page_size_), page_size_);
      SAPWOOD_CHECK(node.hashes[i] == previous, "node ", node.id, ": hash of page ", i);
    }
  }
  if (node.attached) {
    SAPWOOD_CHECK(FindChild(node.parent, node.keys.data()) == &node, "node ", node.id, " cannot be found");
    SAPWOOD_CHECK(node.first_child != nullptr || node.pins > 0 || !IsUseless(&node), "node ", node.id,
                  " is a leaf of no use");
  }
}

void RadixTree::CheckLists() const {
  for (int g = 0; g < num_groups_; ++g) {
    const auto i = static_cast<size_t>(g);
    std::set<const TreeNode*> listed;
    const TreeNode* older = nullptr;
    int32_t num_evictable = 0;
    for (const TreeNode* node = lru_[i].oldest; node != nullptr; older = node, node = node->groups[i].newer) {
      SAPWOOD_CHECK(node->live && node->attached && node->parent != nullptr, "group ", g, " lists a stray node");
      SAPWOOD_CHECK(node->groups[i].older == older, "group ", g, ": a broken LRU link");
      SAPWOOD_CHECK(listed.insert(node).second, "group ", g, " lists node ", node->id, " twice");
      SAPWOOD_CHECK(node->groups[i].locks == 0 && node->num_valid(g) > 0, "group ", g, " lists node ", node->id,
                    " with ", node->groups[i].locks, " locks and ", node->num_valid(g), " pages");
      SAPWOOD_CHECK(is_window(g) || listed.count(node->parent) == 0, "group ", g, " lists node ", node->id,
                    " after its parent");
      num_evictable += node->num_valid(g);
    }
    SAPWOOD_CHECK(lru_[i].newest == older, "group ", g, ": the LRU list's end");
    SAPWOOD_CHECK(num_evictable == evictable_[i], "group ", g, ": evictable is ", evictable_[i], ", recounted ",
                  num_evictable);
    for (const TreeNode& node : nodes_) {
      const bool expected = node.live && node.attached && node.parent != nullptr && node.groups[i].locks == 0 &&
                            node.num_valid(g) > 0;
      SAPWOOD_CHECK(expected == (listed.count(&node) == 1), "group ", g, ": node ", node.id, " on the LRU list: ",
                    !expected);
    }
  }
}

void RadixTree::Check(std::span<const PathLock* const> locks, std::vector<std::vector<bool>>* seen) const {
  // Nodes reachable from the roots are the attached ones.
  std::set<const TreeNode*> reached;
  std::vector<const TreeNode*> todo;
  for (const auto& [ns, root] : roots_) {
    SAPWOOD_CHECK(root->parent == nullptr && root->ns == ns && root->live, "the root of namespace ", ns);
    SAPWOOD_CHECK(root->first_child != nullptr || root->pins > 0, "the root of namespace ", ns, " is of no use");
    todo.push_back(root);
  }
  while (!todo.empty()) {
    const TreeNode* node = todo.back();
    todo.pop_back();
    SAPWOOD_CHECK(reached.insert(node).second, "node ", node->id, " is reached twice");
    for (const TreeNode *child = node->first_child, *previous = nullptr; child != nullptr;
         previous = child, child = child->next_sibling) {
      SAPWOOD_CHECK(child->parent == node && child->prev_sibling == previous, "node ", child->id, ": sibling links");
      todo.push_back(child);
    }
  }
  size_t num_spare = 0, num_chained = 0;
  for (const TreeNode& node : nodes_) {
    SAPWOOD_CHECK((node.live && node.attached) == (reached.count(&node) == 1), "node ", node.id, ": reachability");
    if (node.live) CheckNode(node, seen);
    num_spare += node.live ? 0 : 1;
  }
  SAPWOOD_CHECK(num_spare == spare_.size(), "a node is neither live nor spare");
  SAPWOOD_CHECK(reached.size() == static_cast<size_t>(num_nodes_) + roots_.size(), "num_nodes is ", num_nodes_);
  for (const TreeNode* node : buckets_) {
    for (; node != nullptr; node = node->next_in_bucket) ++num_chained;
  }
  SAPWOOD_CHECK(num_chained == static_cast<size_t>(num_nodes_), "the hash table holds ", num_chained, " nodes");

  // Locks, from those who hold them.
  std::unordered_map<const TreeNode*, std::vector<int32_t>> counts;  // per group, then pins
  for (const PathLock* lock : locks) {
    for (const TreeNode* node = lock->node; node != nullptr; node = node->parent) {
      std::vector<int32_t>& count = counts[node];
      count.resize(static_cast<size_t>(num_groups_) + 1);
      ++count.back();
      for (size_t g = 0; node->parent != nullptr && g < static_cast<size_t>(num_groups_); ++g) {
        if (node->begin >= lock->from[g] && node->begin < lock->to[g]) ++count[g];
      }
    }
  }
  for (const TreeNode& node : nodes_) {
    if (!node.live) continue;
    const std::vector<int32_t>& count = counts[&node];
    SAPWOOD_CHECK(node.pins == (count.empty() ? 0 : count.back()), "node ", node.id, " has ", node.pins, " pins");
    for (size_t g = 0; g < static_cast<size_t>(num_groups_); ++g) {
      SAPWOOD_CHECK(node.groups[g].locks == (count.empty() ? 0 : count[g]), "node ", node.id, " has ",
                    node.groups[g].locks, " locks in group ", g);
    }
  }
  CheckLists();
}

}  // namespace sapwood
